"""How far channels can be cut in modern exports: ``python benchmarks/reach.py FOLDER [--build] [--expand none all]``.

``--build`` first writes more than 200 exports of public architectures (timm, transformers, torchvision, diffusers; many in tiny
configurations, random weights, by both exporters of PyTorch) into the folder, which needs `requirements-reach.txt` in an environment of
its own; nothing is downloaded. An export that fails is named and left out.

Then, for every file as it stands and with expansion: whether half of every group could be cut, was exact, and ran at another size than
traced; the share of the MACs that went; the points of the MACs that stayed for each reason, were their layers halved as well; and
milliseconds of processor time per node. A row per model, then the sums.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 300  # for one model, with one flag
HALF = 0.5

# ---- exports ---------------------------------------------------------------------------------------------------------

TIMM = (
    "bat_resnext26ts botnet26t_256 caformer_s18 coat_lite_tiny coatnet_nano_rw_224 convformer_s18 convit_tiny convmixer_768_32 "
    "convnext_atto convnextv2_atto crossvit_9_240 cspdarknet53 cspresnet50 davit_tiny deit_tiny_patch16_224 densenet121 dla34 dpn48b "
    "eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientformer_l1 efficientnet_b0 efficientnetv2_rw_t efficientvit_b0 "
    "efficientvit_m0 fastvit_t8 focalnet_tiny_srf fbnetc_100 gcresnet33ts gernet_s ghostnet_100 ghostnetv2_100 gmixer_24_224 "
    "gmlp_ti16_224 hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_v3 inception_next_tiny lambda_resnet26t lcnet_050 levit_128s "
    "maxvit_nano_rw_256 mixer_s16_224 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 "
    "mvitv2_tiny nest_tiny nf_resnet26 nfnet_l0 pit_ti_224 poolformer_s12 poolformerv2_s12 pvt_v2_b0 regnetx_002 regnety_002 "
    "repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnest14d resnet18 resnext26ts rexnet_100 rexnetr_100 "
    "sebotnet33ts_256 selecsls42b semnasnet_075 sequencer2d_s skresnet18 starnet_s1 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 "
    "tiny_vit_5m_224 tinynet_a twins_svt_small vgg11 vit_tiny_patch16_224 xcit_nano_12_p16_224 cait_xxs24_224 eva02_tiny_patch14_224"
).split()
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet maxvit_t mnasnet0_5 mobilenet_v2 regnet_x_400mf resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_0 swin_v2_t vit_b_16"
).split()
TEXT = (
    "albert bart bert bloom camembert convbert deberta deberta-v2 distilbert electra ernie esm falcon fnet funnel gemma gemma2 gpt2 "
    "gpt_neo gpt_neox gptj ibert llama longformer mamba megatron-bert mistral mobilebert mpnet mpt nystromformer olmo opt phi qwen2 "
    "rembert roberta roformer squeezebert stablelm t5 xlm xlnet xmod yoso"
).split()
VISION = (
    "beit convnext convnextv2 cvt deit dinov2 glpn hiera levit mobilenet_v2 mobilevit poolformer pvt regnet resnet sam_vision_model "
    "segformer swin swinv2 vit yolos"
).split()
AUDIO = "hubert wav2vec2 wavlm sew unispeech".split()
DIFFUSERS = "unet_cond vae dit pixart".split()
FOUR = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 96)}
SMALLER: dict[str, tuple[dict[str, Any], int]] = {  # configurations and image sizes of models from timm that are slow as they are
    "swin_tiny_patch4_window7_224": ({"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "img_size": 56}, 56),
    "convnextv2_atto": (FOUR, 64), "convnext_atto": (FOUR, 64), "inception_next_tiny": (FOUR, 64),
    "vit_tiny_patch16_224": ({"embed_dim": 64, "depth": 3, "num_heads": 4, "img_size": 64}, 64),
    "densenet121": ({"growth_rate": 8, "block_config": (2, 2, 2, 2)}, 64),
    "davit_tiny": ({"depths": (1,) * 4, "embed_dims": (24, 48, 96, 192), "num_heads": (3, 6, 12, 24)}, 64),
    "sequencer2d_s": ({"layers": (1,) * 4}, 64), "convit_tiny": ({"depth": 3, "img_size": 64}, 64),
    "cait_xxs24_224": ({"depth": 2, "img_size": 64}, 64), "xcit_nano_12_p16_224": ({"depth": 2, "img_size": 64}, 64),
    "eva02_tiny_patch14_224": ({"depth": 2, "img_size": 56}, 56),
    **{name: ({"img_size": 64}, 64) for name in (
        "coat_lite_tiny maxvit_nano_rw_256 gmlp_ti16_224 mixer_s16_224 mvitv2_tiny coatnet_nano_rw_224 twins_svt_small "
        "pit_ti_224".split())},
    **{name: ({}, 64) for name in (
        "efficientvit_b0 repvit_m0_9 mobilevit_xxs pvt_v2_b0 regnety_002 resnext26ts poolformer_s12 ghostnet_100 edgenext_xx_small "
        "fastvit_t8 focalnet_tiny_srf lambda_resnet26t skresnet18 resnest14d hrnet_w18_small res2net50_26w_4s".split())},
}  # fmt: skip
MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TINY: dict[str, tuple[dict[str, Any], int]] = {  # of models from transformers that take images
    **{name: ({**MODEL, "image_size": 64}, 64) for name in ("beit", "vit", "deit")},
    "yolos": ({**MODEL, "image_size": [64, 64], "num_detection_tokens": 5}, 64),
    "dinov2": ({**MODEL, "image_size": 56, "patch_size": 14}, 56),
    "swin": ({"image_size": 56, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}, 56),
    "swinv2": ({"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, 64),
    "hiera": ({"embed_dim": 32, "depths": [1, 1, 2, 1]}, 224),
    "regnet": ({"hidden_sizes": [32, 64, 96, 128], "depths": [1] * 4, "groups_width": 16, "embedding_size": 16}, 64),
    "segformer": ({"hidden_sizes": [16, 32, 64, 96], "depths": [1] * 4, "decoder_hidden_size": 32}, 64),
    "sam_vision_model": (
        {**MODEL, "output_channels": 32, "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}, 64),
}


@dataclass(frozen=True)
class Export:
    """A model to be written: ``make`` gives the module and its inputs."""

    name: str
    make: Callable[[], tuple[Any, tuple[Any, ...]]]
    dynamo: bool


def exports() -> Iterator[Export]:
    """All of them; every third is written by the newer exporter too."""
    makers: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {}
    makers |= {f"timm_{name}": lambda name=name: _timm(name) for name in TIMM}
    makers |= {f"tv_{name}": lambda name=name: _torchvision(name) for name in TORCHVISION}
    makers |= {f"hf_{name}": lambda name=name: _transformers(name, "text") for name in TEXT}
    makers |= {f"hf_{name}": lambda name=name: _transformers(name, "vision") for name in VISION}
    makers |= {f"hf_{name}": lambda name=name: _transformers(name, "audio") for name in AUDIO}
    makers |= {f"df_{name}": lambda name=name: _diffusers(name) for name in DIFFUSERS} | {"hf_clip": _pair, "hf_siglip": _pair_by_probe}
    for number, (name, make) in enumerate(makers.items()):
        yield Export(name, make, False)
        if number % 3 == 0:
            yield Export(f"{name}__dynamo", make, True)


def _timm(name: str) -> tuple[Any, tuple[Any, ...]]:
    import timm
    import torch

    options, size = SMALLER.get(name, ({}, 0))
    model = timm.create_model(name, pretrained=False, num_classes=10, exportable=True, **options)
    return model, (torch.randn(2, 3, *[size] * 2 if size else model.default_cfg["input_size"][1:]),)


def _torchvision(name: str) -> tuple[Any, tuple[Any, ...]]:
    import torch
    import torchvision

    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **more), (torch.randn(2, 3, 224, 224),)


SIZES = {  # of a configuration, as far as it has them
    120: "vocab_size", 2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads eos_token_id",
    64: "hidden_size d_model n_embd dim max_position_embeddings", 32: "embedding_size", 0: "pad_token_id", 1: "bos_token_id",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_conv_pos_embedding_groups",
    128: "intermediate_size d_ff n_inner hidden_dim ffn_dim encoder_ffn_dim decoder_ffn_dim", 16: "d_kv head_dim num_conv_pos_embeddings",
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}


def _transformers(name: str, kind: str) -> tuple[Any, tuple[Any, ...]]:
    import torch
    from transformers import AutoConfig, AutoModel

    options, size = TINY.get(name, ({}, 224))
    config = AutoConfig.for_model(name, **options)
    lists = ("num_heads", "num_attention_heads", "hidden_size")
    for key, value in SMALL.items() if kind != "vision" else ():
        if hasattr(config, key) and not (key in lists and isinstance(getattr(config, key), (list, tuple))):
            with suppress(AttributeError):
                setattr(config, key, value)
    config.use_cache = False
    config._attn_implementation = "eager"
    model = AutoModel.from_config(config)

    given = {"vision": torch.randn(1, 3, size, size), "audio": torch.randn(1, 4000), "text": torch.randint(3, 100, (1, 12))}
    both = getattr(config, "is_encoder_decoder", False)
    return _wrapped(lambda x: model(x, **({"decoder_input_ids": x} if both else {}))[0], model), (given[kind],)


def _wrapped(answer: Callable[..., Any], model: Any) -> Any:
    """A module of what is exported of a model."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return answer(*inputs)

    return Wrapped()


def _pair(probe: bool = False) -> tuple[Any, tuple[Any, ...]]:
    """Words and pictures, compared; with a ``probe`` that asks all places of a picture."""
    import torch
    import transformers

    words = {**MODEL, "vocab_size": 120, "max_position_embeddings": 12 if probe else 32, "eos_token_id": 2}
    config = (transformers.SiglipConfig if probe else transformers.CLIPConfig)(
        text_config=words, vision_config={**MODEL, "image_size": 64, "patch_size": 16}
    )
    config._attn_implementation = "eager"
    model = (transformers.SiglipModel if probe else transformers.CLIPModel)(config)
    inputs = (torch.randint(3, 100, (2, 12)), torch.randn(2, 3, 64, 64))
    return _wrapped(lambda ids, pixels: model(input_ids=ids, pixel_values=pixels).logits_per_image, model), inputs


def _pair_by_probe() -> tuple[Any, tuple[Any, ...]]:
    return _pair(True)


def _diffusers(name: str) -> tuple[Any, tuple[Any, ...]]:
    import diffusers
    import torch

    blocks, turn = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}, torch.tensor([3])
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    heads = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16, "in_channels": 4, "norm_num_groups": 8}
    latent, words = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    if name == "unet_cond":
        options = {"down_block_types": down, "up_block_types": up, "cross_attention_dim": 32, "attention_head_dim": 8}
        model = diffusers.UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4, **blocks, **options)
        return _wrapped(lambda x, t, c: model(x, t, c).sample, model), (latent, turn, words)
    if name == "vae":
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        model = diffusers.AutoencoderKL(latent_channels=4, **blocks, **kinds)
        return _wrapped(lambda x: model.encode(x).latent_dist.mode(), model), (torch.randn(1, 3, 32, 32),)
    if name == "dit":
        model = diffusers.DiTTransformer2DModel(out_channels=4, patch_size=2, num_embeds_ada_norm=10, **heads)
        return _wrapped(lambda x, t, c: model(x, t, c).sample, model), (latent, turn, torch.tensor([1]))
    model = diffusers.PixArtTransformer2DModel(out_channels=8, cross_attention_dim=64, caption_channels=32, **heads)
    more = {"resolution": None, "aspect_ratio": None}
    return _wrapped(lambda x, t, c: model(x, c, t, added_cond_kwargs=more).sample, model), (latent, turn, words)


def build(folder: Path, only: str) -> None:
    """Write what is not there yet."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for export in exports():
        path = folder / f"{export.name}.onnx"
        if path.exists() or only not in export.name:
            continue
        torch.manual_seed(0)
        try:
            with _limited(SECONDS):
                model, inputs = export.make()
                model.eval()
                how = _how(export, inputs)
                torch.onnx.export(model, inputs, str(path), **how)
        except Exception as failure:
            print(f"{export.name}: not exported: {type(failure).__name__}: {str(failure)[:100]!r}", flush=True)
            path.unlink(missing_ok=True)


def _how(export: Export, inputs: tuple[Any, ...]) -> dict[str, Any]:
    names = [f"x{number}" if number else "x" for number in range(len(inputs))]
    if export.dynamo:
        return {"dynamo": True, "external_data": False, "opset_version": 18, "input_names": names, "verbose": False}
    fixed = export.name.startswith("df_")  # a step of time has no batch
    axes = {name: {0: "batch", 1: "length"} if array.ndim == 2 else {0: "batch"} for name, array in zip(names, inputs, strict=True)}
    return {
        "dynamo": False, "opset_version": 17, "input_names": names, "do_constant_folding": True, "dynamic_axes": {} if fixed else axes
    }  # fmt: skip


class _limited:
    """An error after so many seconds."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._late)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)

    def _late(self, *_: object) -> None:
        raise TimeoutError(f"not done after {self.seconds} s")


# ---- what can be cut of them -----------------------------------------------------------------------------------------


def row(path: Path, expand: str) -> dict[str, Any]:
    """What one file gives with one flag."""
    import sfp_onnx
    from sfp_onnx.coupling.analysis import free_share

    start, facts = time.process_time(), {"model": path.stem, "expand": expand, "cut": False, "exact": False, "other size": False}
    try:
        with _limited(SECONDS):
            analysis = sfp_onnx.inspect(path, expand=expand)
            size = analysis.size()
            facts |= {"nodes": len(analysis.prepared.nodes), "free": free_share(analysis), "left": points(analysis)}
            facts["inspect"] = (time.process_time() - start) / len(analysis.prepared.nodes)
            result = sfp_onnx.prune(analysis, sfp_onnx.PlanOptions(ratio=HALF))
            cut = 1 - result.plan.after.macs / size.macs
            facts |= {"cut": cut > 0, "exact": True, "macs": cut}
            facts["other size"] = result.verification is not None and "other sizes" in result.verification.errors
    except Exception as failure:
        facts["error"] = f"{type(failure).__name__}: {failure}".replace("|", "/")[:300]
    facts["seconds"] = time.process_time() - start
    return facts


def points(analysis: Any) -> dict[str, float]:
    """Points of the MACs that stay for each reason: what would go if half of these layers' pinned channels went too."""
    total, left = analysis.size().macs, Counter[str]()
    macs = {layer.node.name: layer.macs / analysis.samples for layer in analysis.coupling.layers}
    widths = {layer.node.name: max(1, len(layer.writes)) for layer in analysis.coupling.layers}
    for pin in analysis.coupling.pinned:
        if pin.reason == "graph output" and len(pin.layers) == 1:
            continue  # what a classifier answers
        for name in pin.layers:
            left[pin.reason] += 100 * HALF * macs[name] * min(1.0, pin.channels / len(pin.layers) / widths[name]) / max(total, 1)
    return {reason: share for reason, share in left.most_common() if share >= 0.05}


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line of sums."""
    count = len(rows)
    cut, exact, other = (sum(row[key] for row in rows) for key in ("cut", "exact", "other size"))
    shares = sorted(row.get("macs", 0.0) for row in rows)
    left = Counter[str]()
    for row in rows:
        for reason, share in row.get("left", {}).items():
            left[reason] += share / count
    speed = sum(row["seconds"] for row in rows) / max(1, sum(row.get("nodes", 0) for row in rows))
    reasons = "; ".join(f"{reason} {share:.1f}" for reason, share in left.most_common(8))
    counts = [str(number) for number in (count, cut, exact, other)]
    return [*counts, f"{shares[count // 2]:.1%}", f"{sum(left.values()):.1f}", reasons, f"{1e3 * speed:.1f}"]


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--build", action="store_true", help="write the exports first")
    parser.add_argument("--only", default="", help="part of the names")
    parser.add_argument("--expand", nargs="+", choices=("none", "all"), default=["none", "all"])
    parser.add_argument("--rows", type=Path, help="also write a JSON line per model here; those that are there are not run again")
    options = parser.parse_args()
    if options.build:
        build(options.folder, options.only)
    paths = sorted(path for path in options.folder.glob("*.onnx") if options.only in path.stem)
    if not paths:
        parser.error(f"{options.folder}: there are no .onnx files in it")
    known = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows and options.rows.exists() else []
    rows = {(row["model"], row["expand"]): row for row in known}
    print("| model | expand | MACs cut | exact | other size | left, points | ms per node |\n|---|---|---|---|---|---|---|")
    for path in paths:
        for expand in options.expand:
            if (path.stem, expand) not in rows:
                rows[path.stem, expand] = facts = row(path, expand)
                if options.rows:
                    with options.rows.open("a") as file:
                        file.write(json.dumps(facts) + "\n")
            facts = rows[path.stem, expand]
            left = facts.get("error") or "; ".join(f"{reason} {share:.1f}" for reason, share in facts["left"].items())
            speed = 1e3 * facts["seconds"] / max(1, facts.get("nodes", 1))
            cells = [path.stem, expand, f"{facts.get('macs', 0):.1%}", facts["exact"], facts["other size"], left, f"{speed:.1f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print("\n| expand | models | cut | exact | at another size | median MACs cut | points left | of them | ms per node |")
    print("|---" * 9 + "|")
    for expand in options.expand:
        there = [rows[path.stem, expand] for path in paths]
        print(f"| {' | '.join([expand, *summary(there)])} |")


if __name__ == "__main__":
    sys.exit(main())
