"""The adapter methods, one file each."""

from imgadapt.methods.adalora import AdaLoRA
from imgadapt.methods.anchored import Anchored
from imgadapt.methods.base import Method
from imgadapt.methods.bitfit import BitFit
from imgadapt.methods.boft import BOFT
from imgadapt.methods.bottleneck import Bottleneck
from imgadapt.methods.c3a import C3A
from imgadapt.methods.compacter import Compacter
from imgadapt.methods.delora import DeLoRA
from imgadapt.methods.dora import DoRA
from imgadapt.methods.fourierft import FourierFT
from imgadapt.methods.full import Full, Norm
from imgadapt.methods.glora import GLoRA
from imgadapt.methods.gralora import GraLoRA
from imgadapt.methods.hira import HiRA
from imgadapt.methods.hra import HRA
from imgadapt.methods.ia3 import IA3
from imgadapt.methods.loha import LoHa
from imgadapt.methods.lokr import LoKr
from imgadapt.methods.lora import LoRA
from imgadapt.methods.loraxs import LoRAXS
from imgadapt.methods.miss import MiSS
from imgadapt.methods.mora import MoRA
from imgadapt.methods.oft import OFT
from imgadapt.methods.osf import OSF
from imgadapt.methods.peanut import PEANuT
from imgadapt.methods.psoft import PSOFT
from imgadapt.methods.randlora import RandLoRA
from imgadapt.methods.road import RoAd
from imgadapt.methods.shira import SHiRA
from imgadapt.methods.svdiff import SVDiff
from imgadapt.methods.tinylora import TinyLoRA
from imgadapt.methods.tlora import TLoRA
from imgadapt.methods.trainable_tokens import TrainableTokens
from imgadapt.methods.vblora import VBLoRA
from imgadapt.methods.vera import VeRA
from imgadapt.methods.waveft import WaveFT

METHODS: tuple[type[Method], ...] = (
    LoRA,
    AdaLoRA,
    TLoRA,
    LoHa,
    LoKr,
    OFT,
    BOFT,
    DoRA,
    GLoRA,
    IA3,
    Full,
    Norm,
    BitFit,
    HiRA,
    HRA,
    Anchored,
    MoRA,
    RoAd,
    VeRA,
    GraLoRA,
    FourierFT,
    SHiRA,
    C3A,
    WaveFT,
    PEANuT,
    DeLoRA,
    RandLoRA,
    MiSS,
    SVDiff,
    PSOFT,
    VBLoRA,
    TrainableTokens,
    Bottleneck,
    Compacter,
    OSF,
    LoRAXS,
    TinyLoRA,
)

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "METHODS",
    "OFT",
    "OSF",
    "PSOFT",
    "AdaLoRA",
    "Anchored",
    "BitFit",
    "Bottleneck",
    "Compacter",
    "DeLoRA",
    "DoRA",
    "FourierFT",
    "Full",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "Method",
    "MiSS",
    "MoRA",
    "Norm",
    "PEANuT",
    "RandLoRA",
    "RoAd",
    "SHiRA",
    "SVDiff",
    "TLoRA",
    "TinyLoRA",
    "TrainableTokens",
    "VBLoRA",
    "VeRA",
    "WaveFT",
]
