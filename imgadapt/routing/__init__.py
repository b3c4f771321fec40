"""Routing: which of several frozen adapters acts how much, told anew in each forward by time, prompt and picture."""

from imgadapt.routing.arrow import Arrow
from imgadapt.routing.files import RouterFile, load_router, save_router
from imgadapt.routing.poly import Poly
from imgadapt.routing.routed import Routed, route, routed, unroute
from imgadapt.routing.router import Router
from imgadapt.routing.xlora import XLoRA

__all__ = ["Arrow", "Poly", "Routed", "Router", "RouterFile", "XLoRA", "load_router", "route", "routed", "save_router",
           "unroute"]  # fmt: skip
