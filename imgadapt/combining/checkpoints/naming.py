"""What checkpoints call the layers of models: UNets in LDM's words, text encoders in open_clip's, the rest by table."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from imgadapt.arch import Architecture, Slice, architectures, canonical

Shapes = Mapping[str, tuple[int, ...]]
"""Module of a file -> shape of its weight."""
Owners = Mapping[str, Sequence[Slice]]
"""Module of a file -> the layers (full canonical names) that it is; `rows` 0: all of them, as they are."""

DENOISERS = ("unet", "transformer")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "")
"""What a denoiser's keys may begin with in a single file."""
_CLIP = {
    "cond_stage_model.transformer.": ("l", False), "conditioner.embedders.0.transformer.": ("l", False),
    "text_encoders.clip_l.transformer.": ("l", False), "text_encoders.clip_g.transformer.": ("g", False),
    "cond_stage_model.model.": ("l", True), "conditioner.embedders.0.model.": ("g", True),
    "conditioner.embedders.1.model.": ("g", True), "text_encoders.t5xxl.transformer.": ("t5", False),
}  # fmt: skip
"""Prefix of a text encoder -> which it is, and whether it has open_clip's names."""
_OUTER = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OPEN_CLIP = {
    "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_OPEN_CLIP_OUTER = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection",
}


def plain(name: str) -> str:
    """A layer's name without CLIP's `text_model.`, which versions of transformers have or have not."""
    return name.replace(".text_model.", ".", 1) if name.startswith("text_encoder") else name


def ldm(path: str, paths: Collection[str]) -> str | None:
    """A layer of a UNet with two layers a block (all of them have) in LDM's words; None: it has no word for it.

    paths: all layers, which tell whether a block attends. Source: openaimodel.py of CompVis/latent-diffusion.
    """
    outer = next((o for o in _OUTER if path == o or path.startswith(f"{o}.")), None)
    if outer is not None:
        inner = path[len(outer) + 1 :]
        return ".".join(filter(None, (_OUTER[outer], _RESNET.get(inner, inner) if "resnets" in outer else inner)))
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if found is None:
        return None
    way, block, kind, layer, inner = found[1], int(found[2]), found[3], int(found[4]), found[5]
    start = f"input_blocks.{1 + 3 * block}" if way == "down" else f"output_blocks.{3 * block}"
    room, first = start.rpartition(".")[0], int(start.rpartition(".")[2])
    if kind == "downsamplers":
        return f"{room}.{first + 2}.0.op"
    if kind == "upsamplers":
        attends = f"up_blocks.{block}.attentions.0.proj_in" in paths
        return f"{room}.{first + 2}.{2 if attends else 1}.{inner}"
    if kind == "attentions":
        return f"{room}.{first + layer}.1.{inner}"
    return f"{room}.{first + layer}.0.{_RESNET.get(inner, inner)}"


def open_clip(module: str, rows: int, component: str) -> list[Slice]:
    """The layers that a module of open_clip's text tower is, which has q, k and v as one; none: it is no layer of CLIP
    as transformers has it (`logit_scale`).
    """
    if (outer := _OPEN_CLIP_OUTER.get(module)) is not None:
        return [Slice(f"{component}.{outer}", 0, 0, 0)]
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", module)
    if found is None:
        return []
    layer = f"{component}.text_model.encoder.layers.{found[1]}"
    if found[2] == "attn.in_proj":
        return [Slice(f"{layer}.self_attn.{n}_proj", 0, k * (rows // 3), rows // 3) for k, n in enumerate("qkv")]
    inner = _OPEN_CLIP.get(found[2])
    return [] if inner is None else [Slice(f"{layer}.{inner}", 0, 0, 0)]


@dataclass(frozen=True)
class Naming:
    """Whose layers the modules of a denoiser are. There may be no table: then a file's names are the layers'."""

    architecture: Architecture | None
    owners: Owners


def native_of(architecture: Architecture, component: str) -> dict[str, tuple[Slice, ...]]:
    """Module of the model's own code, without component -> the layers that it is."""
    start = f"{component}."
    own = {n.removeprefix(start): s for n, s in architecture.native.items() if n.startswith(start)}
    if own:
        return own
    paths = {name.removeprefix(start) for name in architecture.shapes if name.startswith(start)}
    named = {path: ldm(path, paths) if component == "unet" else path for path in sorted(paths)}
    return {module: (Slice(start + path, 0, 0, 0),) for path, module in named.items() if module is not None}


def whole_file(modules: Shapes) -> Naming:
    """Of a single file: its denoiser (in the model's own words or in diffusers', with a prefix or without) and its text
    encoders. No owners: it is no checkpoint of a model that is known.
    """
    best = max(_namings(modules), key=lambda row: row[0], default=None)
    if best is None:
        return Naming(None, {})
    architecture, owners = best[1], dict(best[2])
    components = [c for c in dict.fromkeys(n.partition(".")[0] for n in architecture.shapes) if c not in DENOISERS]
    for module, shape in modules.items():
        prefix = next((p for p in _CLIP if module.startswith(p)), None)
        if prefix is None:
            continue
        kind, other = _CLIP[prefix]
        component, path = _component(kind, components), module.removeprefix(prefix)
        owners[module] = open_clip(path, shape[0], component) if other else [Slice(f"{component}.{path}", 0, 0, 0)]
    return Naming(architecture, _in_the_tables_words(owners, architecture))


def _component(kind: str, components: Sequence[str]) -> str:
    """Of the pipeline that has these text encoders."""
    if kind == "t5":
        return components[-1] if components else "text_encoder"
    if kind == "g":
        return "text_encoder_2"
    return "text_encoder"


def _in_the_tables_words(owners: Owners, architecture: Architecture) -> dict[str, Sequence[Slice]]:
    words = {plain(name): name for name in architecture.shapes}
    return {
        module: [Slice(words.get(plain(s.layer), s.layer), s.start, s.first, s.rows) for s in own]
        for module, own in owners.items()
    }


def _namings(modules: Shapes) -> Iterator[tuple[tuple[int, ...], Architecture, Owners]]:
    """Each way to take them: (layers found, of the table's shape; lacking, negative), architecture, owners."""
    for prefix in _PREFIXES:
        own = {module.removeprefix(prefix): module for module in modules if module.startswith(prefix)}
        for architecture in architectures() if own else ():
            component = next(iter(architecture.shapes)).partition(".")[0]
            same = {
                n.partition(".")[2]: (Slice(n, 0, 0, 0),) for n in architecture.shapes if n.startswith(f"{component}.")
            }
            for named in (native_of(architecture, component), same):
                there = [module for module in named if module in own]
                exact = sum(_agrees(architecture, named[m], modules[own[m]]) for m in there)
                if 2 * len(there) > min(len(named), len(own)):
                    found = {own[m]: named[m] for m in there}
                    yield (len(there), exact, len(there) - len(named)), architecture, found


def _agrees(architecture: Architecture, slices: Sequence[Slice], shape: tuple[int, ...]) -> bool:
    rows = max(s.first + s.rows for s in slices) or architecture.shapes[slices[0].layer][0]
    return (rows, *architecture.shapes[slices[0].layer][1:]) == shape


def component_folders(components: Mapping[str, Shapes]) -> Naming:
    """Of a folder of diffusers': names are the layers', whatever the model is."""
    owners = {
        f"{component}.{module}": [Slice(canonical(f"{component}.{module.removesuffix('.in_proj')}"), 0, 0, 0)]
        for component, modules in components.items()
        for module in modules
    }
    scores: list[tuple[tuple[int, int, int], Architecture]] = []
    for architecture in architectures():
        for component in (c for c in components if c in DENOISERS):
            own = {n: shape for n, shape in architecture.shapes.items() if n.startswith(f"{component}.")}
            shapes = {f"{component}.{module}": shape for module, shape in components[component].items()}
            there = [name for name in own if name in shapes]
            exact = sum(own[name] == shapes[name] for name in there)
            if 2 * len(there) > len(shapes):
                scores.append(((len(there), exact, len(there) - len(own)), architecture))
    best = max(scores, key=lambda row: row[0], default=None)
    if best is None:
        return Naming(None, owners)
    return Naming(best[1], _in_the_tables_words(owners, best[1]))
