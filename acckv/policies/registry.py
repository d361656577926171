"""The policies by name, those of other packages among them, and how one is made from what a file names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from acckv.config import from_options
from acckv.errors import InputError
from acckv.io.registry import Registry
from acckv.policies.base import Policy

POLICIES: Registry[type[Policy]] = Registry("policy", "acckv.policies")

P = TypeVar("P", bound=type[Policy])


def register_policy(name: str) -> Callable[[P], P]:
    """Register a policy class under `name`; it is then known to the commands, the exports and the lists.

    ::

        @register_policy("mine")
        @dataclass(frozen=True)
        class Mine(Policy):
            window_size: int = option(16, "Observed queries at the end of the prompt.", low=1)

    Raises:
        InputError: another module has the name.
    """

    def register(policy: P) -> P:
        policy.name = name
        POLICIES.register(name, policy, policy.__module__)
        return policy

    return register


def make_policy(given: Policy | str | Mapping[str, Any]) -> Policy:
    """The policy that a name, or a mapping of `class_path` and `init_args`, stands for.

    Args:
        given: such as ``"snapkv"`` or ``{"class_path": "snapkv", "init_args": {"window_size": 64}}``. A class path is a
            registered name or the import path of a class.

    Raises:
        InputError: an unknown policy or option; the message lists the known ones.
    """
    if isinstance(given, Policy):
        return given
    if isinstance(given, str):
        return POLICIES.find(given)()
    if not isinstance(given, Mapping) or "class_path" not in given or given.keys() - {"class_path", "init_args"}:
        raise InputError(f"{given!r} is neither a name nor a mapping of class_path and init_args", field="policy")
    policy = _policy_class(given["class_path"])
    return from_options(policy, given.get("init_args") or {}, policy.name)


def _policy_class(path: str) -> type[Policy]:
    if path in POLICIES or "." not in path:
        return POLICIES.find(path)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{path!r} cannot be imported: {error}", field="policy") from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise InputError(f"{path!r} is no policy", field="policy")
    return found
