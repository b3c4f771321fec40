"""The tools themselves load what imgadapt writes, and the other way round, and both give the same outputs.

Where a tool is known not to, that is shown, not passed by: the case says what it does instead.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from imgadapt import (
    BOFT,
    IA3,
    OFT,
    AdapterFile,
    DoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Method,
    Norm,
    attach,
    detach,
    load,
    save,
)
from imgadapt.arch import architectures, canonical
from imgadapt.errors import FormatError
from imgadapt.formats import Part
from imgadapt.sites import Kind
from imgadapt.targets import Targets, components, find

Run = Callable[[Any], Tensor]


def broken(reason: str) -> pytest.MarkDecorator:
    """What imgadapt has wrong, until it is right."""
    return pytest.mark.xfail(strict=True, reason=reason)


LORA = (LoRA(rank=4, alpha=2), LoRA(rank=2, alpha=3), LoRA(rank=3, alpha=4.5))
DORA = (DoRA(LoRA(rank=4, alpha=2)), DoRA(LoRA(rank=2, alpha=3)))
ONE_ALPHA = (LoRA(rank=4, alpha=3), LoRA(rank=2, alpha=3), LoRA(rank=7, alpha=3))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# models


class Net(nn.Module):
    """Convolutions and linear layers, with and without bias, of no architecture that has a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.deep = nn.ModuleList([nn.Conv2d(8, 12, (3, 1), stride=2, padding=(1, 0)), nn.Conv2d(12, 16, 1)])
        self.first = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.last = nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv, *self.deep):
            x = torch.tanh(conv(x))
        return self.last(self.norm(torch.tanh(self.first(x.flatten(2).transpose(1, 2)))))


def net() -> tuple[Any, Run]:
    x = torch.randn(3, 4, 6, 8)
    return Net(), lambda model: model(x)


def _unet(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **changes})


def sd1() -> tuple[Any, Run]:
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 12)
    return _unet(), lambda model: model(x, t, text).sample


def sdxl() -> tuple[Any, Run]:
    """SDXL's blocks, as the numbers in its own layer names count them."""
    model = _unet(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
    )
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 12)
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.randn(2, 6)}
    return model, lambda model: model(x, t, text, added_cond_kwargs=added).sample


def sd3() -> tuple[Any, Run]:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    x, text, pooled, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 6), torch.tensor([3, 500])
    return model, lambda model: model(x, text, pooled, t).sample


def flux() -> tuple[Any, Run]:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    x, text, pooled = torch.randn(2, 6, 4), torch.randn(2, 5, 12), torch.randn(2, 6)
    image_ids, text_ids = torch.randn(6, 3), torch.zeros(5, 3)
    t, guidance = torch.tensor([0.3, 0.7]), torch.tensor([3.5, 1.0])
    return model, lambda model: model(x, text, pooled, t, image_ids, text_ids, guidance).sample


MODELS = {"net": net, "sd1": sd1, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def adapter(model: Any, methods: Sequence[Method], targets: Targets = "*", std: float = 0.1) -> AdapterFile:
    """Random tensors on these layers, the methods by turns."""
    parts: dict[str, Part] = {}
    kinds: tuple[Kind, ...] = ("norm",) if methods[0].name == "norm" else ("linear", "conv")
    for i, layer in enumerate(find(components(model), targets, kinds)):
        method = methods[i % len(methods)]
        if method.check(layer.site) is None:
            method = method.at(layer.site)
            fresh = method.init(layer.site, layer.module.get_parameter("weight").detach())
            tensors = {name: tensor + torch.randn(tensor.shape) * std for name, tensor in fresh.items()}
            if method.name == "ia3":
                tensors.pop("diff_b", None)  # as peft's, which multiplies the bias
            parts[canonical(layer.name)] = Part(method, tensors, shape=layer.site.shape)
    return AdapterFile(parts)


def with_file(model: Any, run: Run, file: AdapterFile) -> Tensor:
    attach(model, file)
    try:
        return run(model)
    finally:
        detach(model)


def same(theirs: Tensor, ours: Tensor, bare: Tensor) -> None:
    size = bare.std().item()
    assert (ours - bare).abs().max() > 0.02 * size
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=2e-5 * size)


# peft

ATTENTION = ["*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.ff.net*", "*time_emb*linear*"]
LINEAR = {"net": ["*first", "*last"], "sd1": ATTENTION}


@pytest.fixture(autouse=True)
def _boft_without_its_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft would compile it for CUDA."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def through_peft(name: str, methods: Sequence[Method], targets: Targets, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(peft's output, ours, the bare model's) of a folder that imgadapt wrote."""
    model, run = MODELS[name]()
    model.eval()
    file = adapter(model, methods, targets)
    path = save(file, folder / "ours", format="peft")
    ours, bare = with_file(model, run, file), run(model)
    theirs: Any = PeftModel.from_pretrained(model, path)
    return run(theirs.eval().base_model.model), ours, bare


ANYWHERE: dict[str, Sequence[Method]] = {
    "lora": LORA,
    "rslora": tuple(LoRA(rank, alpha, rank_stabilised=True) for rank, alpha in ((4, 2), (2, 3))),
    "dora": DORA,
    "loha": (LoHa(rank=3, alpha=2), LoHa(rank=2, alpha=3)),
}


@pytest.mark.parametrize("name", ["net", "sd1", "flux"])
@pytest.mark.parametrize("kind", ANYWHERE)
def test_peft_gives_the_same_output_with_what_imgadapt_wrote(name: str, kind: str, tmp_path: Path) -> None:
    same(*through_peft(name, ANYWHERE[kind], "*", tmp_path))


LINEAR_ONLY: dict[str, Sequence[Method]] = {
    "lokr": (LoKr(rank=1, alpha=3),),
    "lokr of mixed alphas": (LoKr(rank=1, alpha=3), LoKr(rank=1, alpha=0.5)),
    "oft": (OFT(4, "input"),),
    "oft neumann": (OFT(4, "input", neumann=5),),
    "oft shared": (OFT(4, "input", shared=True),),
    "coft": (OFT(4, "input", constraint=0.5),),
    "boft": (BOFT(4, 1, "input", rescaled=True),),
    "ia3": (IA3(absolute=True, bias=True),),
    "ia3 of inputs": (IA3("input", absolute=True),),
    "ia3 of both": (IA3(absolute=True, bias=True), IA3("input", absolute=True)),
}


@pytest.mark.filterwarnings("ignore:The cayley-neumann parameterization")
@pytest.mark.parametrize("name", ["net", "sd1"])
@pytest.mark.parametrize("kind", LINEAR_ONLY)
def test_peft_gives_the_same_output_of_linear_layers(name: str, kind: str, tmp_path: Path) -> None:
    """peft's OFT of convolutions is no identity even when fresh, and takes kernels for square."""
    same(*through_peft(name, LINEAR_ONLY[kind], LINEAR[name], tmp_path))


@pytest.mark.parametrize("kind", ["boft", "ia3", "ia3 of inputs", "ia3 of both"])
def test_peft_gives_the_same_output_of_convolutions(kind: str, tmp_path: Path) -> None:
    same(*through_peft("sd1", LINEAR_ONLY[kind], "*", tmp_path))


CHECKPOINTING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


@pytest.mark.filterwarnings(CHECKPOINTING)
@pytest.mark.parametrize(
    "stabilised",
    [False, True],
)
def test_peft_gives_the_same_output_of_a_text_encoder(stabilised: bool, tmp_path: Path) -> None:
    model, ids = text_encoder(CLIPTextModelWithProjection), torch.randint(1, 49, (2, 6))
    file = adapter({"text_encoder_2": model}, [LoRA(4, 2, rank_stabilised=stabilised), LoRA(2, 3)][: 2 - stabilised])
    path = save(file, tmp_path / "ours", format="peft")
    bare = model(ids)[0]
    ours = with_file({"text_encoder_2": model}, lambda _: model(ids)[0], file)
    theirs: Any = PeftModel.from_pretrained(model, path)
    same(theirs.eval().base_model.model(ids)[0], ours, bare)


@pytest.mark.filterwarnings(CHECKPOINTING)
@broken("keys have `text_model.`, which CLIPTextModel has not from transformers 5.6 on: all of it is missing")
def test_peft_gives_the_same_output_of_a_text_encoder_without_text_model(tmp_path: Path) -> None:
    model, ids = text_encoder(CLIPTextModel), torch.randint(1, 49, (2, 6))
    file = adapter({"text_encoder": model}, LORA)
    path = save(file, tmp_path / "ours", format="peft")
    bare = model(ids)[0]
    ours = with_file({"text_encoder": model}, lambda _: model(ids)[0], file)
    theirs: Any = PeftModel.from_pretrained(model, path)
    same(theirs.eval().base_model.model(ids)[0], ours, bare)


Hard = tuple[str, Sequence[Method], Targets, str]
HARD: dict[str, Hard] = {
    "lokr of convolutions": ("sd1", (LoKr(rank=1, alpha=3),), ["*.conv1"], ""),
    "lokr of full factors": ("net", (LoKr(None),), LINEAR["net"], ""),
    "lokr of some full factors": ("sd1", (LoKr(rank=2, alpha=3),), ATTENTION, ""),
    "lokr of a chosen factor": ("sd1", (LoKr(rank=1, alpha=3, factor=4),), ATTENTION, ""),
    "lokr decomposed twice": ("net", (LoKr(rank=1, alpha=3, both=True),), LINEAR["net"], ""),
    "tucker lokr": ("sd1", (LoKr(rank=1, alpha=3, tucker=True),), ["*.conv1"], ""),
    "tucker loha": ("sd1", (LoHa(rank=3, alpha=2, tucker=True),), ["*.conv1"], ""),
    "biases": ("sd1", (LoRA(rank=4, alpha=2, bias=True),), ["*.ff.net.2"], ""),
    "ia3 of both in Flux": (
        *("flux", (IA3(absolute=True, bias=True), IA3("input", absolute=True)), "*"),
        "",
    ),
    "ia3 without a table": ("net", (IA3(absolute=True, bias=True),), ["*conv"], ""),
    "boft without a table": ("net", (BOFT(4, 1, "input", rescaled=True),), ["*conv"], ""),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:.*have invalid shape")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case[:3], id=kind, marks=[broken(case[3])] if case[3] else []) for kind, case in HARD.items()],
)
def test_peft_gives_the_same_output_where_its_config_decides(
    case: tuple[str, Sequence[Method], Targets], tmp_path: Path
) -> None:
    same(*through_peft(*case, tmp_path))


def peft_config(kind: str, **settings: Any) -> Any:
    return getattr(importlib.import_module("peft"), kind)(**settings)


def randomise(module: nn.Module, std: float = 0.2) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape) * std)


UNET_ENDS = ["to_q", "to_out.0", "ff.net.2", "linear_1"]
PEFT_WRITES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 2, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"linear_1": 9}}),
    "lora of convolutions": ("LoraConfig", {"r": 3, "lora_alpha": 2, "target_modules": ["conv1", "proj_in", "to_k"]}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 2, "use_dora": True, "target_modules": ["conv1", "to_q"]}),
    "lora with biases": ("LoraConfig", {"r": 4, "lora_alpha": 2, "lora_bias": True, "target_modules": ["ff.net.2"]}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 2, "rank_pattern": {"to_q": 2}}),
    "loha tucker": ("LoHaConfig", {"r": 3, "alpha": 2, "use_effective_conv2d": True, "target_modules": ["conv1"]}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3, "rank_pattern": {"to_q": 1}}),
    "lokr of full factors, which it scales": ("LoKrConfig", {"r": 64, "alpha": 16}),
    "lokr of both": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}),
    "lokr tucker": ("LoKrConfig", {"r": 1, "alpha": 3, "use_effective_conv2d": True, "target_modules": ["conv1"]}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
    "oft neumann": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 1}),
    "boft of convolutions": ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["conv1", "to_q"]}),
    "ia3": ("IA3Config", {"feedforward_modules": ["ff.net.2"]}),
    "ia3 of convolutions": ("IA3Config", {"feedforward_modules": ["conv2"], "target_modules": ["conv1", "conv2"]}),
}


@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # its biases, to peft itself
@pytest.mark.parametrize("kind", PEFT_WRITES)
def test_imgadapt_gives_the_same_output_with_what_peft_wrote(kind: str, tmp_path: Path) -> None:
    name, settings = PEFT_WRITES[kind]
    model, run = sd1()
    theirs = get_peft_model(copy.deepcopy(model.eval()), peft_config(name, **{"target_modules": UNET_ENDS, **settings}))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    file = load(tmp_path)
    assert (file.format, file.architecture) == ("peft", "sd1")
    same(with_file(model, run, file), run(theirs.eval().base_model.model), run(model))


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ((LoKr(None, factor=2), LoKr(None, factor=-1)), "peft has one factor and one rule for all LoKr layers"),
        ((LoRA(rank=4, alpha=2, bias=True),), "peft has a bias in all LoRA layers of a file or in none"),
    ],
)
def test_what_no_one_config_of_peft_says_is_refused(methods: Sequence[Method], said: str, tmp_path: Path) -> None:
    file = adapter(MODELS["sd1"]()[0], methods, ATTENTION)
    with pytest.raises(FormatError, match=said):
        save(file, tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()


@broken("an embedding that is not called one is written as a linear layer is; peft has lora_embedding_A for it")
def test_peft_gives_the_same_output_of_embeddings(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 8))
    x = torch.randint(0, 20, (2, 5))
    file = adapter({"unet": model}, LORA, ["*.0", "*.1"])
    ours, bare = with_file({"unet": model}, lambda _: model(x), file), model(x)
    theirs: Any = PeftModel.from_pretrained(model, save(file, tmp_path / "ours", format="peft"))
    same(theirs.eval().base_model.model(x), ours, bare)


def test_a_folder_of_peft_s_for_a_model_without_a_table_is_read(tmp_path: Path) -> None:
    model, run = net()
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=2, target_modules=["conv", "first"]))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    same(with_file(model, run, load(tmp_path)), run(theirs.eval().base_model.model), run(model))


# LyCORIS

LYCORIS: dict[str, Sequence[Method]] = {
    "lora": LORA,
    "tucker": (LoRA(rank=3, alpha=2, tucker=True),),
    "dora": DORA,
    "loha": (LoHa(rank=3, alpha=2), LoHa(rank=2, alpha=3)),
    "loha tucker": (LoHa(rank=3, alpha=2, tucker=True),),
    "dora over loha": (DoRA(LoHa(rank=3, alpha=2)),),
    "lokr": (LoKr(rank=1, alpha=3), LoKr(rank=2, alpha=3)),
    "lokr of both": (LoKr(rank=1, alpha=3, both=True),),
    "lokr of full factors": (LoKr(None),),
    "lokr of a chosen factor": (LoKr(rank=2, alpha=3, factor=4),),
    "dora over lokr": (DoRA(LoKr(rank=1, alpha=3)),),
    "glora": (GLoRA(rank=3, alpha=2),),
    "full": (Full(),),
    # its loader makes a rotation of the size that its own rule gives, no more than the root of the outputs
    "diag-oft": (OFT(2),),
    "diag-oft with a limit": (OFT(2, constraint=0.01),),
    "diag-oft, rescaled": (OFT(2, rescaled=True),),
}
PREFIXES = {"lycoris-wrapper": "lycoris", "lycoris": "lora_unet"}


def through_lycoris(
    monkeypatch: pytest.MonkeyPatch, name: str, form: str, methods: Sequence[Method], folder: Path, targets: Targets
) -> tuple[Tensor, Tensor, Tensor]:
    """(LyCORIS' output, ours, the bare model's) of a file that imgadapt wrote."""
    lycoris: Any = pytest.importorskip("lycoris")
    monkeypatch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", PREFIXES[form])
    model, run = MODELS[name]()
    model.eval()
    file = adapter(model, methods, targets, 0.05)
    path = save(file, folder / "ours.safetensors", format=form)
    ours, bare = with_file(model, run, file), run(model)
    torch.testing.assert_close(with_file(model, run, load(path)), ours, rtol=1e-5, atol=1e-5)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
    assert len(network.loras) == len(file.parts)
    network.eval().apply_to()
    return run(model), ours, bare


@pytest.mark.parametrize(("name", "form"), [("sd1", "lycoris"), ("flux", "lycoris-wrapper")])
@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_gives_the_same_output_with_what_imgadapt_wrote(
    name: str, form: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    same(*through_lycoris(monkeypatch, name, form, LYCORIS[kind], tmp_path, "*"))


@pytest.mark.parametrize("form", PREFIXES)
def test_lycoris_gives_the_same_output_of_norms(form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    same(*through_lycoris(monkeypatch, "sd1", form, (Norm(),), tmp_path, ["*.norm1", "*.norm2"]))


@pytest.mark.parametrize("form", PREFIXES)
@pytest.mark.parametrize("limits", [{}, {"rescaled": True}, {"constraint": 0.01}], ids=str)
def test_lycoris_gives_the_same_output_of_a_boft_of_all_its_stages(
    form: str, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has no word for fewer: their number follows from the layer's size."""
    methods = (BOFT(2, 3, **limits),)
    same(
        *through_lycoris(
            monkeypatch,
            "sd1",
            form,
            methods,
            tmp_path,
            ["*down_blocks.0*.attn*", "*down_blocks.0*.conv[12]", "unet.conv_in"],
        )
    )


LYCORIS_RAISES: dict[str, tuple[Method, type[Exception], str]] = {  # of one stage, it fills all with that
    "dora of inputs": (DoRA(LoRA(rank=4, alpha=2), "input"), RuntimeError, "broadcast shape"),
    "tucker lokr": (LoKr(rank=1, alpha=3, tucker=True), AttributeError, "lokr_w2_a"),
    "ia3": (IA3(), TypeError, "positional arguments"),
    "diag-oft of larger blocks than there are blocks": (OFT(4), RuntimeError, "must match|broadcast"),
    "boft of fewer stages than fit": (BOFT(2, 2), RuntimeError, "must match"),
}


@pytest.mark.parametrize("kind", LYCORIS_RAISES)
def test_lycoris_cannot_load_what_it_can_train(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its loader, not the file: `through_lycoris` has read it back, and LyCORIS' own files raise there, too."""
    method, error, words = LYCORIS_RAISES[kind]
    with pytest.raises(error, match=words):
        through_lycoris(monkeypatch, "sd1", "lycoris-wrapper", (method,), tmp_path, ["*.to_q", "*.conv1"])


def test_lycoris_has_no_norm_without_a_bias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flux' are RMSNorm, which it passes by when it trains, and whose weights it cannot load."""
    with pytest.raises(AttributeError, match="w_norm"):
        through_lycoris(monkeypatch, "flux", "lycoris-wrapper", (Norm(),), tmp_path, ["*.norm_q", "*.norm_k"])


LYCORIS_WRITES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora tucker": {"use_tucker": True},
    "lora with a scalar": {"use_scalar": True},
    "dora": {"weight_decompose": True, "wd_on_out": True},
    "dora of inputs": {"weight_decompose": True, "wd_on_out": False},
    "loha": {"network_module": "loha"},
    "loha tucker": {"network_module": "loha", "use_tucker": True},
    "lokr": {"network_module": "lokr", "lora_dim": 1, "conv_lora_dim": 2},
    "lokr of both": {"network_module": "lokr", "lora_dim": 1, "conv_lora_dim": 1, "decompose_both": True},
    "lokr tucker": {"network_module": "lokr", "lora_dim": 1, "conv_lora_dim": 1, "use_tucker": True},
    "lokr of full factors": {"network_module": "lokr", "full_matrix": True},
    "dora over lokr": {"network_module": "lokr", "lora_dim": 1, "weight_decompose": True, "wd_on_out": True},
    "rank-stabilised": {"rs_lora": True},
    "diag-oft": {"network_module": "diag-oft", "rescaled": True},
    "diag-oft with a limit": {"network_module": "diag-oft", "constraint": 0.01},
    "boft": {"network_module": "boft", "rescaled": True},
    "glora": {"network_module": "glora"},
    "ia3": {"network_module": "ia3"},
    "full": {"network_module": "full"},
    "with norms": {"train_norm": True},
}


@pytest.mark.parametrize(
    ("kind", "prefix"), [("lora", "lycoris"), ("lokr", "lycoris"), *((kind, "lora_unet") for kind in LYCORIS_WRITES)]
)
def test_imgadapt_gives_the_same_output_with_what_lycoris_wrote(
    kind: str, prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network: Any = pytest.importorskip("lycoris").LycorisNetwork
    monkeypatch.setattr(network, "LORA_PREFIX", prefix)
    settings = {"lora_dim": 4, "alpha": 2, "conv_lora_dim": 3, "conv_alpha": 4, "network_module": "locon"}
    model, run = sd1()
    model.eval()
    adapted = copy.deepcopy(model)
    made = network(adapted, 1.0, **{**settings, **LYCORIS_WRITES[kind], "warn_on_unmatched": False})
    made.apply_to()
    randomise(made, 0.02 if kind in ("full", "with norms") else 0.1)
    path = tmp_path / "theirs.safetensors"
    theirs = run(adapted) if made.eval() else None
    made.save_weights(str(path), torch.float32, {})
    file = load(path)
    assert (file.architecture, file.unknown, len(file.parts)) == ("sd1", {}, len(made.loras))
    assert theirs is not None
    same(with_file(model, run, file), theirs, run(model))


# diffusers


def text_encoder(kind: Any) -> Any:
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        vocab_size=50,
        max_position_embeddings=8,
        projection_dim=10,
        bos_token_id=0,
        eos_token_id=1,
    )
    return kind(config).eval()


def absent(*names: str) -> dict[str, Any]:
    """A pipeline's parts that are not needed here."""
    return dict.fromkeys(names)


def pipeline(name: str) -> tuple[Any, Run]:
    """One that draws nothing: a denoiser and its text encoders; and all of their outputs in one row."""
    denoiser, run = MODELS[name]()
    denoiser.eval()
    euler: Any = EulerDiscreteScheduler(steps_offset=1)
    ids = torch.randint(1, 49, (2, 6))
    flow: Any = FlowMatchEulerDiscreteScheduler()
    if name == "sd1":
        made: Any = StableDiffusionPipeline(
            **absent("vae", "tokenizer", "safety_checker", "feature_extractor"),
            text_encoder=text_encoder(CLIPTextModel),
            unet=denoiser,
            scheduler=euler,
            requires_safety_checker=False,
        )
    elif name == "sdxl":
        made = StableDiffusionXLPipeline(
            **absent("vae", "tokenizer", "tokenizer_2"),
            text_encoder=text_encoder(CLIPTextModel),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection),
            unet=denoiser,
            scheduler=euler,
        )
    elif name == "sd3":
        made = StableDiffusion3Pipeline(
            **absent("vae", "tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder_3"),
            text_encoder=text_encoder(CLIPTextModelWithProjection),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection),
            transformer=denoiser,
            scheduler=flow,
        )
    else:
        made = FluxPipeline(
            **absent("vae", "tokenizer", "tokenizer_2", "text_encoder_2"),
            text_encoder=text_encoder(CLIPTextModel),
            transformer=denoiser,
            scheduler=flow,
        )
    encoders = [encoder for encoder in ("text_encoder", "text_encoder_2") if getattr(made, encoder, None) is not None]

    def outputs(pipe: Any) -> Tensor:
        words = [getattr(pipe, encoder)(ids)[0].flatten() for encoder in encoders]
        return torch.cat([run(getattr(pipe, "unet", None) or pipe.transformer).flatten(), *words])

    return made, outputs


@dataclass
class Case:
    """A file for a pipeline: which, of what, and where."""

    name: str
    form: str
    methods: Sequence[Method] = LORA
    targets: Targets = "*"


def through_diffusers(case: Case, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(diffusers' output, ours, the bare pipeline's) of a file that imgadapt wrote."""
    pipe, run = pipeline(case.name)
    file = adapter(pipe, case.methods, case.targets)
    path = save(file, folder / "ours.safetensors", format=case.form)
    ours, bare = with_file(pipe, run, file), run(pipe)
    torch.testing.assert_close(with_file(pipe, run, load(path)), ours, rtol=1e-5, atol=1e-5)
    pipe.load_lora_weights(path)
    return run(pipe), ours, bare


STABILISED = tuple(LoRA(rank, 2, rank_stabilised=True) for rank in (4, 2))
ATTENTION_OF_FLUX = ["*.transformer_blocks*.to_[qkv]", "*.add_[qkv]_proj", "*.to_out.0", "*.to_add_out"]
REST_OF_FLUX = ["*.ff.*", "*.ff_context.*", "*transformer_blocks*norm*linear", "*.to_out.0", "*.to_add_out"]
SINGLES_OF_FLUX = ["*single*proj_out", "*single*norm.linear"]
EMBEDDERS_OF_FLUX = ["transformer.*embed*"]
LOADED: dict[str, Case] = {
    **{f"{name} {form}": Case(name, form) for name in ("sd1", "sdxl", "sd3", "flux") for form in ("diffusers",)},
    "sd1 dora": Case("sd1", "diffusers", DORA, "denoiser"),
    "flux dora": Case("flux", "diffusers", DORA, "denoiser"),
    "sd1 rslora": Case("sd1", "diffusers", STABILISED),
    "flux biases": Case("flux", "diffusers", (LoRA(rank=4, alpha=2, bias=True),), "denoiser"),
    "flux last layer alone": Case("flux", "diffusers", LORA, ["transformer.proj_out"]),
    **{f"{name} legacy": Case(name, "diffusers-legacy", LORA, "denoiser") for name in ("sd1", "sdxl", "sd3", "flux")},
    "sd1 kohya": Case("sd1", "kohya", ONE_ALPHA),
    "sdxl kohya": Case("sdxl", "kohya", ONE_ALPHA),
    "sd1 onetrainer": Case("sd1", "onetrainer", ONE_ALPHA),
    "flux kohya, fused": Case("flux", "kohya", LORA, ATTENTION_OF_FLUX),
    "flux kohya": Case("flux", "kohya", LORA, [*REST_OF_FLUX, *SINGLES_OF_FLUX]),
    "flux kohya, text": Case("flux", "kohya", LORA, "text"),
    "flux onetrainer, attention": Case("flux", "onetrainer", LORA, ATTENTION_OF_FLUX),
    "flux onetrainer, embedders": Case("flux", "onetrainer", LORA, EMBEDDERS_OF_FLUX),
    "flux comfyui, fused": Case("flux", "comfyui", LORA, ATTENTION_OF_FLUX),
    "flux comfyui": Case("flux", "comfyui", LORA, [*REST_OF_FLUX, *SINGLES_OF_FLUX]),
    "flux xlabs": Case("flux", "xlabs", LORA, ATTENTION_OF_FLUX),
}


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
@pytest.mark.parametrize("kind", LOADED)
def test_diffusers_gives_the_same_output_with_what_imgadapt_wrote(kind: str, tmp_path: Path) -> None:
    same(*through_diffusers(LOADED[kind], tmp_path))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_diffusers_older_files_have_text_encoders_too(name: str, tmp_path: Path) -> None:
    same(*through_diffusers(Case(name, "diffusers-legacy"), tmp_path))


IGNORED: dict[str, Case] = {
    "kohya's alphas where they differ": Case("sd1", "kohya", LORA),  # patterns that match no layer
    "embedders of Flux": Case("flux", "kohya", LORA, EMBEDDERS_OF_FLUX),  # converted without `transformer.`
    "the last layer of Flux": Case("flux", "kohya", LORA, ["transformer.proj_out"]),  # also without its alpha
    "Flux' native names with peft's ends": Case("flux", "ai-toolkit", LORA, ATTENTION_OF_FLUX),  # passed on as they are
    "magnitudes of text encoders": Case("sd1", "diffusers", DORA, "text"),  # its own files', too
    "SD3's names of OneTrainer": Case("sd3", "onetrainer", LORA, "denoiser"),
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("kind", IGNORED)
def test_diffusers_passes_by_what_imgadapt_reads(kind: str, tmp_path: Path) -> None:
    """Its defect, without an error; `through_diffusers` has asserted that the file itself is right."""
    theirs, ours, bare = through_diffusers(IGNORED[kind], tmp_path)
    assert (theirs - ours).abs().max() > 1e-3
    if kind not in ("kohya's alphas where they differ", "magnitudes of text encoders"):  # these it takes in part
        assert torch.equal(theirs, bare)


REFUSED: dict[str, tuple[Case, type[Exception], str]] = {
    "OneTrainer's layers other than attention": (Case("flux", "onetrainer", LORA, REST_OF_FLUX), KeyError, "weight"),
    "fal's without all layers": (Case("flux", "fal", LORA, ATTENTION_OF_FLUX), KeyError, "img_mod"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_diffusers_refuses_what_imgadapt_reads(kind: str, tmp_path: Path) -> None:
    """Several layers end up under one name there; and of fal's it takes all to be there."""
    case, error, words = REFUSED[kind]
    with pytest.raises(error, match=words):
        through_diffusers(case, tmp_path)


# (architecture, format): what diffusers' converter loses of the layers outside of blocks and of the first two blocks
OUTSIDE_OF_FLUX = ("context_embedder", "x_embedder", "norm_out.linear", "proj_out", "time_text_embed.")
CONVERTED: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("flux", "kohya"): ("FluxPipeline", OUTSIDE_OF_FLUX),  # converted without `transformer.`
    ("flux", "comfyui"): ("FluxPipeline", OUTSIDE_OF_FLUX),
    ("flux2", "kohya"): ("Flux2Pipeline", ("double_stream_mod", "single_stream_mod", "norm_out", "time_guidance")),
    ("flux2", "ai-toolkit"): ("Flux2Pipeline", ("norm_out.linear",)),  # shift and scale are not swapped
    ("flux2_klein_4b", "kohya"): ("Flux2KleinPipeline", ("double_stream_mod", "single_stream_mod", "norm_out")),
    ("flux2_klein_4b", "ai-toolkit"): ("Flux2KleinPipeline", ("norm_out.linear",)),
    ("qwen", "kohya"): ("QwenImagePipeline", ()),
    ("qwen", "ai-toolkit"): ("QwenImagePipeline", ()),
    ("qwen", "comfyui"): ("QwenImagePipeline", ()),
    ("wan", "ai-toolkit"): ("WanPipeline", ()),
    ("hidream", "ai-toolkit"): ("HiDreamImagePipeline", ()),
    ("ltx", "ai-toolkit"): ("LTXPipeline", ("proj_in", "time_embed")),
    ("zimage", "kohya"): ("ZImagePipeline", ("all_final_layer", "all_x_embedder")),
}


@pytest.mark.parametrize(("name", "form"), CONVERTED, ids=lambda value: value)
def test_diffusers_converts_files_of_real_sizes(name: str, form: str, tmp_path: Path) -> None:
    """It has widths in its code, so what it makes of a file is compared, not a tiny model's outputs."""
    pipe, lost = CONVERTED[name, form]
    table = next(a for a in architectures() if a.name == name)
    parts: dict[str, Part] = {}
    for layer, shape in sorted(table.shapes.items()):
        numbers = [int(word) for word in layer.split(".") if word.isdigit()]
        if layer.startswith("transformer.") and len(shape) == 2 and min(shape) > 9 and max(numbers[:1], default=0) < 2:
            method = LORA[len(parts) % 3]
            tensors = {"down": torch.randn(method.rank, shape[1]), "up": torch.randn(shape[0], method.rank)}
            parts[layer] = Part(method, tensors)
    path = save(AdapterFile(parts, architecture=name), tmp_path / "ours.safetensors", format=form)
    state: Any = getattr(diffusers, pipe).lora_state_dict(str(path))
    wrong: list[str] = []
    for layer, part in parts.items():
        down, up = (state.get(f"{layer}.lora_{end}.weight") for end in "AB")
        x = torch.randn(2, part.tensors["down"].shape[1])
        ours = part.method.scale * (x @ part.tensors["down"].T @ part.tensors["up"].T)
        if down is None or (x @ down.T @ up.T - ours).abs().max() > 1e-5 * ours.abs().max():
            wrong.append(layer.removeprefix("transformer."))
    assert [layer for layer in wrong if not layer.startswith(lost)] == []
    assert all(any(layer.startswith(start) for layer in wrong) for start in lost)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_imgadapt_gives_the_same_output_with_what_diffusers_wrote(name: str, tmp_path: Path) -> None:
    pipe, run = pipeline(name)
    bare = run(pipe)
    denoiser = "unet" if name == "sdxl" else "transformer"
    ends = ["to_q", "to_out.0", "proj_out", "ff.net.2"]
    words = ["q_proj", "fc1"]
    configs: dict[str, dict[str, Any]] = {
        denoiser: {"r": 4, "lora_alpha": 2, "target_modules": ends, "rank_pattern": {"to_q": 2}},
        "text_encoder": {"r": 3, "lora_alpha": 6, "target_modules": words, "alpha_pattern": {"fc1": 1}},
        **({"text_encoder_2": {"r": 2, "lora_alpha": 3, "target_modules": words}} if name != "flux" else {}),
    }
    given: dict[str, Any] = {}
    for component, settings in configs.items():
        config = LoraConfig(init_lora_weights=False, **settings)
        module = getattr(pipe, component)
        module.add_adapter(config)
        given[f"{component}_lora_layers"] = get_peft_model_state_dict(module)
        given[f"{component}_lora_adapter_metadata"] = config.to_dict()
    theirs = run(pipe)
    type(pipe).save_lora_weights(tmp_path, **given)
    pipe.unload_lora_weights()
    file = load(tmp_path / "pytorch_lora_weights.safetensors")
    assert (file.format, file.unknown) == ("diffusers", {})
    same(with_file(pipe, run, file), theirs, bare)
