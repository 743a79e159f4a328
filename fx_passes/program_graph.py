"""with_graph: an ExportedProgram with another graph, whose signature is valid for it.

A graph that was rewritten may have gained inputs, which become constants of the program, and other results, which keep
the names that the signature knows them by.
"""

from __future__ import annotations

import copy

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from .rewrite import graphs_of


def with_graph(
    program: ExportedProgram, module: fx.GraphModule, constants: dict[fx.Node, Tensor] | None = None
) -> ExportedProgram:
    """The program with another graph; everything else is shared with it.

    Args:
        program: the program; it is left as it is.
        module: a copy of its graph, rewritten.
        constants: the inputs that the graph gained, and their values.
    """
    _tidy(module, program)
    constants = constants or {}
    named = dict(zip(_free_names(program, len(constants)), constants, strict=True))
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=_signature(program.graph_signature, module, named),
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants={**program.constants, **{name: constants[node] for name, node in named.items()}},
        verifiers=program.verifiers,
    )


def _tidy(module: fx.GraphModule, program: ExportedProgram) -> None:
    """Drop what no longer has a reader, such as a mask that became a flag, and let results keep their names."""
    for graph in graphs_of(module):
        graph.graph.eliminate_dead_code()
    (before,), (after,) = program.graph.output_node().args, module.graph.output_node().args
    named = {node.name: node for node in module.graph.nodes}
    for old, new in zip(before, after, strict=True):  # type: ignore[arg-type]
        if isinstance(old, fx.Node) and isinstance(new, fx.Node) and old.name != new.name:
            if old.name in named:  # it is still there, and something follows it
                named[old.name]._rename(f"{old.name}_inner")
            new.name = old.name
    for graph in graphs_of(module):
        graph.recompile()


def _free_names(program: ExportedProgram, count: int) -> list[str]:
    """Names that no constant of the program has: a program may be rewritten twice."""
    taken = {*program.constants, *program.state_dict}
    names = (f"sparseattn_constant_{number}" for number in range(count + len(taken)))
    return [name for name in names if name not in taken][:count]


def _signature(old: ExportGraphSignature, module: fx.GraphModule, added: dict[str, fx.Node]) -> ExportGraphSignature:
    """The signature with constants, which are moved before what the user gives."""
    specs = list(old.input_specs)
    place = next((i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT), len(specs))
    for name, node in added.items():
        module.graph.find_nodes(op="placeholder")[place].prepend(node)
        specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name))
        place += 1
    module.recompile()
    return ExportGraphSignature(specs, list(old.output_specs))
