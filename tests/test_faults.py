"""Files stay whole and errors clear when things break: a few of what tests/faults.py and tests/fuzzing.py do by the thousand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import classifier, ctrl_c, files_in, images, invoke, labels_of, model_of
from onnx import TensorProto, helper

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.core import system
from sfp_onnx.core.errors import OutputError
from sfp_onnx.core.system import available
from sfp_onnx.methods.dilution.stages import DiluteOptions, dilute
from sfp_onnx.pipeline import opened

faults = pytest.importorskip("faults", reason="needs Linux")
fuzzing = pytest.importorskip("fuzzing", reason="needs Linux")
GIB = 1 << 30


# ---- many at random --------------------------------------------------------------------------------------------------


def test_damaged_files_end_in_errors_or_results() -> None:
    cases = [(kind, seed) for seed in range(8) for kind in fuzzing.KINDS]
    found = fuzzing.run(cases)
    assert len(found) == len(cases) and [own for own in found if own.fault] == []


def test_the_fuzz_run_sees_what_it_looks_for() -> None:
    assert fuzzing.fault_of(1, "Internal error: KeyError") and fuzzing.fault_of(4, "") and fuzzing.fault_of(-11, "Error: x")
    assert fuzzing.fault_of(4, "Error: it is damaged") == "" == fuzzing.fault_of(0, "")


def test_killed_runs_leave_nothing_half() -> None:
    counts, found = faults.killed(3, seed=3)
    assert found == [] and sum(counts.values()) >= 3


def test_killed_with_large_temporary_files_they_go() -> None:
    seen, found = faults.hunted(1)
    assert seen == 1 and found == []


def test_two_runs_to_one_name() -> None:
    assert faults.raced(1) == []


def test_full_disk() -> None:
    assert faults.limited_file() == []


def test_read_only_folder() -> None:
    assert faults.read_only() == []


# ---- absurd sizes ----------------------------------------------------------------------------------------------------

PORTS: dict[str, Any] = {"inputs": [("x", np.float32, [1, 3, 8, 8])], "outputs": [("y", np.float32, None)]}


def of(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """conv -> the nodes."""
    conv = helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4)
    weight = np.ones((8, 3, 3, 3), np.float32)
    arrays = {"w": weight, **{name: np.asarray(value) for name, value in constants.items()}}
    return model_of([conv, *nodes], PORTS["inputs"], PORTS["outputs"], arrays)


def huge_initializer(dims: list[int], external: str = "") -> onnx.ModelProto:
    model = classifier()
    tensor = next(own for own in model.graph.initializer if own.name == "w2")
    tensor.dims[:] = dims
    if external:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=external)
    return model


def sparse_bomb() -> onnx.ModelProto:
    model = classifier()
    sparse = model.graph.sparse_initializer.add(dims=[10**6, 10**6])
    sparse.values.CopyFrom(helper.make_tensor("many", TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("at", TensorProto.INT64, [1], [7]))
    return model


def constant_bomb() -> onnx.ModelProto:
    inner = helper.make_sparse_tensor(
        helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]), helper.make_tensor("i", TensorProto.INT64, [1], [0]), [10**12]
    )
    return of(helper.make_node("Constant", [], ["s"], "bomb", sparse_value=inner), helper.make_node("Relu", ["c"], ["y"]))


def nested(depth: int = 25) -> onnx.ModelProto:
    model = classifier()
    body = helper.make_graph([], "deep", [], [])
    for _ in range(depth):
        node = helper.make_node("If", ["k"], ["o"], then_branch=body, else_branch=helper.make_graph([], "e", [], []))
        body = helper.make_graph([node], "g", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["o"], then_branch=body, else_branch=helper.make_graph([], "e", [], [])))
    return model


ABSURD: dict[str, Callable[[], onnx.ModelProto]] = {
    "initializer": lambda: huge_initializer([10**6, 10**6, 3, 3]),
    "initializer over 64 bits": lambda: huge_initializer([2**62, 2**62, 3, 3]),
    "negative initializer": lambda: huge_initializer([-12, -8, 3, 3]),
    "external initializer": lambda: huge_initializer([10**6, 10**6, 3, 3], "own.onnx"),
    "sparse initializer": sparse_bomb,
    "sparse constant": constant_bomb,
    "ConstantOfShape": lambda: of(
        helper.make_node("ConstantOfShape", ["s"], ["z"], "fill"), helper.make_node("Add", ["c", "z"], ["y"]), s=np.array([8, 10**6, 10**6])
    ),
    "Expand": lambda: of(helper.make_node("Expand", ["c", "s"], ["y"], "expand"), s=np.array([10**6, 8, 8, 10**3])),
    "Tile": lambda: of(helper.make_node("Tile", ["c", "s"], ["y"], "tile"), s=np.array([10**6, 1, 10**5, 1])),
    "Range": lambda: of(
        helper.make_node("Range", ["a", "b", "d"], ["r"], "range"), helper.make_node("Cast", ["r"], ["y"], to=1),
        a=np.int64(0), b=np.int64(10**13), d=np.int64(1),
    ),
    "Pad": lambda: of(helper.make_node("Pad", ["c", "s"], ["y"], "pad"), s=np.array([0, 0, 10**6, 10**6, 0, 0, 10**6, 10**6])),
    "Resize": lambda: of(
        helper.make_node("Resize", ["c", "", "s"], ["y"], "resize"), s=np.array([1, 1, 1e5, 1e5], np.float32)
    ),
    "Reshape": lambda: of(helper.make_node("Reshape", ["c", "s"], ["y"], "reshape"), s=np.array([10**6, 10**6])),
    "pads of Conv": lambda: of(helper.make_node("Conv", ["c", "v"], ["y"], "wide", pads=[10**6] * 4), v=np.ones((4, 8, 1, 1), np.float32)),
    "kernel of Conv": lambda: of(
        helper.make_node("Conv", ["c", "v"], ["y"], "wide", kernel_shape=[10**9, 10**9]), v=np.ones((4, 8, 1, 1), np.float32)
    ),
    "dilation of Conv": lambda: of(
        helper.make_node("Conv", ["c", "v"], ["y"], "wide", dilations=[2**31, 2**31], pads=[10**6] * 4), v=np.ones((4, 8, 3, 3), np.float32)
    ),
    "output of ConvTranspose": lambda: of(
        helper.make_node("ConvTranspose", ["c", "v"], ["y"], "wide", strides=[10**6] * 2), v=np.ones((8, 4, 3, 3), np.float32)
    ),
    "OneHot": lambda: of(
        helper.make_node("OneHot", ["i", "n", "v"], ["y"], "hot"), i=np.zeros((1000, 1000), np.int64), n=np.int64(10**9),
        v=np.array([0, 1], np.float32),
    ),
    "sizes computed at run time": lambda: of(
        helper.make_node("Shape", ["c"], ["n"]), helper.make_node("Mul", ["n", "s"], ["m"]),
        helper.make_node("ConstantOfShape", ["m"], ["y"], "fill"), s=np.array([1, 10**4, 10**4, 10**3]),
    ),
    "nested": nested,
}

BOUNDED = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from conftest import invoke
for line in sys.stdin:
    result = invoke(*json.loads(line))
    most = next(own for own in open("/proc/self/status") if own.startswith("VmHWM"))  # ru_maxrss would count what started this, too
    print(json.dumps([result.exit_code, result.stderr, int(most.split()[1]) * 1024]), flush=True)
"""
Ended = tuple[int, str, int]


@pytest.fixture(scope="module")
def bounded() -> Iterator[Callable[..., Ended]]:
    """Run commands in a process that may have 3 GB: exit code, words, and the most memory that the process has held so far."""
    folders = (Path(sfp_onnx.__file__).parents[1], Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", BOUNDED], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def run(*arguments: object) -> Ended:
            stdin.write(json.dumps([str(own) for own in arguments]) + "\n")
            stdin.flush()
            code, said, held = json.loads(stdout.readline())
            return code, said, held

        yield run


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_sizes_end_in_errors(kind: str, tmp_path: Path, bounded: Callable[..., Ended]) -> None:
    path = tmp_path / "own.onnx"
    path.write_bytes(ABSURD[kind]().SerializeToString())
    code, said, held = bounded("prune", path, "-o", tmp_path / "out.onnx", "--ratio", "0.5")
    assert code in (3, 4) and ("\n" + said).count("\nError: ") == 1 and "Internal" not in said and "Traceback" not in said, said
    assert held < GIB and list(files_in(tmp_path)) == ["own.onnx"]


# ---- archives --------------------------------------------------------------------------------------------------------


def archive(path: Path, shape: tuple[int, ...], content: bytes, dtype: str = "<f4") -> Path:
    """An .npz file whose header says ``shape``."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x.npy", header.getvalue() + content)
    return path


@pytest.mark.parametrize("shape", [(10**12, 3, 8, 8), (4, 3, 10**6, 10**6), (2**40, 2**40, 1, 1), (-4, 3, 8, 8)])
def test_headers_that_lie(shape: tuple[int, ...], tmp_path: Path, bounded: Callable[..., Ended]) -> None:
    model = tmp_path / "model.onnx"
    dynamic = model_of([helper.make_node("Relu", ["x"], ["y"])], [("x", np.float32, ["N", "C", "H", "W"])], PORTS["outputs"], {})
    onnx.save(dynamic, model)
    data = archive(tmp_path / "bomb.npz", shape, bytes(1000))
    code, said, held = bounded("evaluate", model, "--data", data)
    assert code == 4 and "bomb.npz" in said and said.count("Error: ") == 1 and held < GIB


def test_zeros_that_unpack_to_gigabytes(tmp_path: Path, bounded: Callable[..., Ended]) -> None:
    """92 MB in half a megabyte: read in pieces."""
    model = tmp_path / "model.onnx"
    onnx.save(classifier(), model)
    path = tmp_path / "bomb.npz"
    rows = 60_000
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (rows, 3, 8, 8)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed, packed.open("x.npy", "w") as stream:
        stream.write(header.getvalue())
        for _ in range(rows // 1000):
            stream.write(bytes(3 * 64 * 8 * 1000))
    assert path.stat().st_size < 2e6
    code, said, held = bounded("evaluate", model, "--data", path, "--no-latency")
    assert code == 0 and held < GIB, said


def test_one_huge_row(tmp_path: Path, bounded: Callable[..., Ended]) -> None:
    """A row that really unpacks to more than there may be: no memory, and a message."""
    model = tmp_path / "model.onnx"
    dynamic = model_of([helper.make_node("Relu", ["x"], ["y"])], [("x", np.float32, ["N", "C", "H", "W"])], PORTS["outputs"], {})
    onnx.save(dynamic, model)
    path = tmp_path / "bomb.npz"
    side = 16_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed, packed.open("x.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (1, 3, side, side)})
        for _ in range(3 * side // 1000):
            stream.write(bytes(side * 1000))
    code, said, _ = bounded("evaluate", model, "--data", path, "--scale", "1", "--no-latency")
    assert code == 4 and "Error: not enough memory" in said, said


# ---- outside data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["../secret", "/etc/passwd", "link", "sub/../../secret", "linked/secret", "."])
def test_external_data_outside_the_folder(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(12 * 8 * 9 * 4))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    path = folder / "own.onnx"
    path.write_bytes(huge_initializer([12, 8, 3, 3], where).SerializeToString())
    result = invoke("prune", path, "-o", folder / "out.onnx", "--ratio", "0.5")
    assert result.exit_code == 4 and ("Refused" in result.stderr or "missing" in result.stderr) and where in result.stderr
    assert not (folder / "out.onnx").exists()


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [False, True])
def test_files_appear_whole_or_not_at_all(older: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = {"file": b"older"} if older else {}
    if older:
        path.write_bytes(b"older")
    with pytest.raises(RuntimeError), graph.save.atomic(path) as (stream,):
        stream.write(b"half")
        raise RuntimeError
    assert files_in(tmp_path) == before
    umask = os.umask(0o027)
    try:
        with graph.save.atomic(path) as (stream,):
            stream.write(b"whole")
            stream.flush()
            (hidden,) = set(files_in(tmp_path)) - {"file"}
            assert hidden.startswith(".file.") and hidden.endswith(".tmp")
            assert files_in(tmp_path) == {**before, hidden: b"whole"}
    finally:
        os.umask(umask)
    assert files_in(tmp_path) == {"file": b"whole"} and path.stat().st_mode & 0o777 == 0o640


def test_what_fails_inside_does_not_appear_with_the_others(tmp_path: Path) -> None:
    with graph.save.together():
        graph.save.write_text(tmp_path / "a", "new")
        with pytest.raises(RuntimeError), graph.save.atomic(tmp_path / "b") as (stream,):
            stream.write(b"half")
            raise RuntimeError
        with pytest.raises(FileNotFoundError), graph.save.atomic(tmp_path / "c", tmp_path / "absent" / "d"):
            pass
    assert files_in(tmp_path) == {"a": b"new"}


def test_names_as_long_as_may_be(tmp_path: Path) -> None:
    graph.save.write_text(tmp_path / ("\u6a21" * 85), "new")
    assert files_in(tmp_path) == {"\u6a21" * 85: b"new"}


def test_files_that_belong_together_appear_together(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    second.write_bytes(b"older")
    with pytest.raises(RuntimeError), graph.save.together():
        graph.save.write_text(first, "new")
        graph.save.write_text(second, "new")
        assert {name for name in files_in(tmp_path) if not name.startswith(".")} == {"b"} and second.read_bytes() == b"older"
        raise RuntimeError
    assert files_in(tmp_path) == {"b": b"older"}
    with graph.save.together():
        graph.save.write_text(first, "new")
        graph.save.write_text(second, "new")
    assert files_in(tmp_path) == {"a": b"new", "b": b"new"}


def test_a_name_that_cannot_be_taken_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", deny)
    with pytest.raises(OutputError, match="Permission denied"):
        graph.save.write_text(tmp_path / "a", "new")
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize(("external", "sparse"), [(False, False), (True, False), (False, True)])
def test_a_fingerprint_is_that_of_the_saved_file(external: bool, sparse: bool, model_file: Path, tmp_path: Path) -> None:
    result = dilute(model_file, DiluteOptions("magnitude", rate=0.8))
    path = result.save(tmp_path / "out.onnx", external, sparse)
    digest, size = graph.save.fingerprint(result.model, path, external, sparse)
    assert digest == sfp_onnx.load(path).sha256 and size == sum(own.stat().st_size for own in tmp_path.glob("out*"))


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9)])
def test_temporary_files_go_with_the_process(end: str, code: int, tmp_path: Path) -> None:
    program = """if 1:
        import os, sys
        from pathlib import Path
        import sfp_onnx.graph.save
        from sfp_onnx import graph
        from sfp_onnx.core import system
        os.chdir("work")
        with graph.save.together():
            graph.save.write_text("own", "words")
            (system.folder() / "f").write_bytes(b"0")
            print(*os.listdir(), system.folder(), flush=True)
        with graph.save.together():
            graph.save.write_text("later", "words")
            """
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(sfp_onnx.__file__).parents[1])}
    process = subprocess.run([sys.executable, "-c", program + end], env=environment, cwd=tmp_path, capture_output=True, text=True)
    hidden, folder = process.stdout.split()
    assert process.returncode == code and hidden.endswith(".tmp") and Path(folder).parent == tmp_path
    whole = {"work/own": b"words", **({"work/later": b"words"} if code == 0 else {})}
    for _ in range(100):
        if files_in(tmp_path) == whole and not Path(folder).exists():
            break
        time.sleep(0.02)
    assert files_in(tmp_path) == whole and not Path(folder).exists()
    assert system.folder() is system.folder()


# ---- memory and signals ----------------------------------------------------------------------------------------------


def test_memory_that_is_not_there_is_an_error(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise MemoryError("Unable to allocate 3.64 TiB")

    monkeypatch.setattr(opened, "inspect", full)
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5")
    assert result.exit_code == 4 and "Error: not enough memory (Unable to allocate 3.64 TiB)" in result.stderr


def test_the_bound_on_memory_is_what_is_there() -> None:
    found = available()
    assert found is not None and 1e8 < found < 1e14
    program = "import resource; from sfp_onnx.core.system import bound; bound(); print(resource.getrlimit(resource.RLIMIT_DATA)[0])"
    environment = {**os.environ, "PYTHONPATH": str(Path(sfp_onnx.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found / 2 < int(done.stdout) < 2 * found


def test_ctrl_c_is_no_internal_error(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(opened, "inspect", interrupt)
    result = invoke("prune", model_file, "-o", tmp_path / "out.onnx", "--ratio", "0.5")
    assert result.exit_code == 130 and "Interrupted" in result.stderr and "nothing was written that is not whole" in result.stderr


GUARDED = "import os, sys, time; vars(os).pop('waitid', None); from sfp_onnx.cli.common import guarded_run; guarded_run(lambda: ({}))"


def guarded(action: str, end: int | None = None, interrupt: Any = signal.default_int_handler) -> tuple[int, str]:
    """An action under the guard of the program, perhaps ended by a signal to its parent alone; exit code and words."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sfp_onnx.__file__).parents[1])}
    command = [sys.executable, "-c", GUARDED.format(action)]
    with ctrl_c(interrupt):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        if end is not None:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(end)
        return process.wait(), process.stderr.read() if process.stderr else ""


def test_a_crash_of_the_interpreter_is_an_error() -> None:
    code, said = guarded("os.kill(os.getpid(), 11)")
    assert code == 4 and said.startswith("Error: onnxruntime or onnx crashed (segmentation fault)") and "not whole" in said
    assert guarded("sys.exit(3)") == (3, "") and guarded("None") == (0, "")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_the_work(end: signal.Signals, tmp_path: Path) -> None:
    code, _ = guarded(f"print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w'), flush=True), print(flush=True), time.sleep(20)", end)
    assert code in (-end, 1)  # Python's own end by Ctrl-C
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the work goes on")


def test_a_program_that_is_to_ignore_ctrl_c_goes_on() -> None:
    assert guarded("print(flush=True), time.sleep(1)", signal.SIGINT, signal.SIG_IGN) == (0, "")


def test_messages_have_a_bearable_length(model_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **{"n" * 5000: images(4), "m": images(4)})
    result = invoke("evaluate", model_file, "--data", tmp_path / "d.npz")
    assert result.exit_code == 4 and len(result.stderr) < 1500 and "[...]" in result.stderr


def test_attributes_that_are_no_text(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node[0].attribute.add(name="auto_pad", type=onnx.AttributeProto.STRING, s=b"\xff\xff")
    path = tmp_path / "own.onnx"
    path.write_bytes(model.SerializeToString())
    result = invoke("inspect", path)
    assert result.exit_code == 4 and "'conv1'" in result.stderr and "auto_pad" in result.stderr


def test_a_size_of_minus_one_is_any_size(tmp_path: Path) -> None:
    model = classifier()
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, tmp_path / "own.onnx")
    assert invoke("prune", tmp_path / "own.onnx", "-o", tmp_path / "out.onnx", "--ratio", "0.5").exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.onnx", "--target", "macs=0.5"), "write macs=50%"),
        (("data.npz", "--ratio", "0.5"), "zip archive"),
        (("model.onnx", "--ratio", "0.5", "--data", "names.npz"), "Number the classes"),
        (("model.onnx", "--ratio", "0.5", "--data", "onehot.npz"), "argmax"),
        (("model.onnx", "--ratio", "0.5", "--data", "floats.npz"), "astype(int)"),
        (("model.onnx", "--ratio", "0.5", "--data", "long.npz"), "one for each"),
        (("model.onnx", "--ratio", "0.5", "--data", "size.npz"), "resize"),
        (("training.onnx", "--ratio", "0.5"), "model.eval()"),
    ],
)
def test_typical_mistakes_are_told_what_to_do(
    words: tuple[str, ...], said: str, model_file: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own, labels = images(10), labels_of(10)
    many = {"names": labels.astype(str), "onehot": np.eye(5)[labels], "floats": labels.astype(np.float32), "long": np.tile(labels, 2)}
    for name, values in many.items():
        np.savez(f"{name}.npz", x=own, labels=values)
    np.savez("size.npz", x=own[:, :, :6, :6])
    training = classifier()
    training.graph.initializer.extend([helper.make_tensor("half", 1, [], [0.5]), helper.make_tensor("on", TensorProto.BOOL, [], [True])])
    training.graph.node.insert(5, helper.make_node("Dropout", ["r2", "half", "on"], ["d"], "drop"))
    training.graph.node[6].input[0] = "d"
    onnx.save(training, "training.onnx")
    result = invoke("prune", *words, "-o", "out.onnx")
    assert result.exit_code in (2, 3, 4) and said in result.stderr.replace("\n", " ") and not Path("out.onnx").exists(), result.stderr


def test_labels_of_an_archive_are_counted_before_they_are_read(tmp_path: Path, model_file: Path) -> None:
    np.savez(tmp_path / "d.npz", x=images(4), labels=labels_of(4))
    assert invoke("evaluate", model_file, "--data", tmp_path / "d.npz", "--no-latency").exit_code == 0
