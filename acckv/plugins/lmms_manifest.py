"""The entry point of `lmms_eval.models`: it names the classes without importing them."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of the model `acckv`: its chat class, and the simple one of `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "acckv.plugins.lmms_eval"
    return ModelManifest("acckv", simple_class_path=f"{module}.AcckvSimple", chat_class_path=f"{module}.Acckv")
