# Generated from notebooks/16_model_read.ipynb by `make book`. Edit the notebook, not this file.

"""What follows what in a model, and whether it may be changed (chapter 16)."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch.fx
from torch import nn
from torch.fx import Node, Proxy
from torch.utils._pytree import tree_leaves

from mixconv.fast.describe import NORMS, activation_name, describe_layer, is_idle, is_one_of, steps
from mixconv.fast.spec import ACTIVATIONS
from mixconv.fast.trial import twin
from mixconv.surgery import has_hooks

__all__ = ["CannotTraceError", "Chains"]


class _Tracer(torch.fx.Tracer):
    """Looks into blocks, not into layers.

    Other threads call their modules as ever, and so does a model what is no part of it.
    """

    def __init__(self, hooked: set[str], parts: set[nn.Module]) -> None:
        super().__init__()
        self.hooked, self.parts, self.thread = hooked, parts, threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_one_of(m, NORMS) or _is_layer(m) or not m._modules:
            return True
        return module_qualified_name in self.hooked or super().is_leaf_module(m, "")

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread or m not in self.parts:  # one activation for all
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _is_layer(module: nn.Module) -> bool:
    return type(module) in describe_layer.registry


class CannotTraceError(Exception):
    """The model's forward does something that torch.fx cannot follow."""


def _trace(model: nn.Module, hooked: set[str]) -> torch.fx.Graph:
    if _is_layer(model):  # is called, and not looked into
        graph = torch.fx.Graph()
        graph.create_node("call_module", "", (graph.placeholder("x"),))
        return graph
    try:
        if "forward" in vars(model):
            raise ValueError("it has a forward of its own")
        return _Tracer(hooked, set(model.modules())).trace(model)
    except Exception as error:  # anything may go wrong in a stranger's forward
        raise CannotTraceError(str(error)) from error


def _held(model: nn.Module) -> Iterator[Any]:
    """All that modules hold outside their lists of parts, in lists and dictionaries too."""
    for module in model.modules():
        others = {key: value for key, value in vars(module).items() if key != "_modules"}
        yield from tree_leaves(others)


def _find_twice_held(model: nn.Module) -> set[nn.Module]:
    """Modules that one change in one place would not change everywhere."""
    names = Counter(part for _, part in model.named_modules(remove_duplicate=False))
    twice = {part for part, count in names.items() if count > 1}
    twice.update(held for held in _held(model) if isinstance(held, nn.Module))
    return {part for module in twice for part in module.modules()}


def _find_obstacles(
    model: nn.Module, graph: torch.fx.Graph, hooked: set[str]
) -> dict[nn.Module, str]:
    """Why modules of a traced model may not be changed."""
    parts = dict(model.named_modules())
    called = [parts[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    calls = Counter(part for module in called for part in module.modules())
    reads = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    tensors = {id(tensor) for name, tensor in model.named_parameters() if name in reads}
    found = dict.fromkeys(_find_twice_held(model), "is reached in more than one way")
    for name, part in parts.items():
        if calls[part] > 1 or any(id(p) in tensors for p in part._parameters.values()):
            found[part] = "is used more than once"
        if name in hooked:
            found[part] = "has hooks, or a forward or weight of its own"
    return found


class Chains:
    """The layers of a model, each with the norm and the activation that only it feeds.

    Args:
        model: is traced, not run.

    Attributes:
        found: names, a list for each layer.
        left: why a layer or norm is in none of them, by name.
        closed: names of modules that were not looked into.

    Raises:
        CannotTraceError: with torch.fx's words.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: list[list[str]] = []
        self.left: dict[str, str] = {}
        self.closed: list[str] = []
        hooked = {name for name, part in model.named_modules() if has_hooks(part)}
        copied = twin(model)
        graph = _trace(copied, hooked)
        self._layers: dict[str, nn.Module] = dict(copied.named_modules())
        self._obstacles = _find_obstacles(copied, graph, hooked)
        self._kept = {held.node for held in _held(copied) if isinstance(held, Proxy)}
        for node in graph.nodes:
            if node.op == "call_module" and _is_layer(self._layer(node)):
                self.found += filter(None, [self._follow(node)])
            elif node.op == "call_module":
                self._pass(node)

    def _pass(self, node: Node) -> None:
        """Look at what is no layer."""
        norm, reason = is_one_of(self._layer(node), NORMS), self._obstacle(node)
        if norm and reason:
            self.left[str(node.target)] = reason
        elif not norm and self._layer(node)._modules:
            self.closed.append(str(node.target))

    def _layer(self, node: Node) -> nn.Module:
        return self._layers[str(node.target)]

    def _obstacle(self, node: Node) -> str:
        parts = self._layer(node).modules()
        return next((self._obstacles[part] for part in parts if part in self._obstacles), "")

    def _follow(self, node: Node) -> list[str]:
        """The chain that begins with a layer; empty if the layer may not be changed."""
        chain: list[str] = []
        while not (reason := self._obstacle(node)):
            if not is_idle(self._layer(node)):
                chain.append(str(node.target))
            if len(node.users) != 1 or node in self._kept:
                return chain
            before, node = node, next(iter(node.users))
            if not self._continues(chain, before, node):
                return chain
        if not chain or is_one_of(self._layer(node), NORMS):
            self.left[str(node.target)] = reason
        return chain

    def _continues(self, chain: list[str], before: Node, node: Node) -> bool:
        """Whether a node takes part: a norm first, then an activation, nothing between."""
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return False
        step, last = self._layer(node), self._layers[chain[-1]]
        if is_idle(step) or (is_one_of(step, NORMS) and len(chain) == 1):
            return True
        # Over, if the last one was an activation, or timm's norm, which brings one of its own.
        ended = activation_name(last) or list(steps([last])) != [last]
        return activation_name(step) in ACTIVATIONS[1:] and not ended
