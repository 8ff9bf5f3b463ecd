"""What a training costs on a mesh, for a terminal."""

from crosslayer.files import size_text
from crosslayer.report import duration, table
from crosslayer.scaling import Machine, MeshPlan, fits


def mesh_table(asked: MeshPlan, quickest: MeshPlan | None, machine: Machine, tokens: int) -> str:
    """The plan that was asked for, and how a quicker one of as many ranks, or one that fits, is asked for."""
    steps = tokens / asked.tokens
    rows = [
        ["ranks", f"{asked.layout.n_ranks} = {asked.layout.n_data} data x {asked.layout.n_feature} feature"],
        ["parameters of a rank", f"{asked.local.n_parameters:,}"],
        ["memory: weights, gradients, moments", size_text(asked.local.memory - asked.local.activations)],
        ["memory: activations", size_text(asked.local.activations)],
        ["memory: language model", size_text(asked.model)],
        ["memory: in all", f"{size_text(asked.memory)} of {_room(machine)}"],
        *[[f"a step computes: {name}", _short(seconds)] for name, seconds in asked.computing.items()],
        *[[f"a step sends: {name}", _sent(asked, name)] for name in asked.sending],
        ["a step", f"{_short(asked.seconds)} for {asked.tokens:,} tokens"],
        ["all steps", duration(steps * asked.seconds)],
    ]
    lines = [table(["", "estimate, a rank"], rows)]
    if not fits(asked, machine):
        lines.append("does not fit into the memory of a rank")
    if quickest is None:
        lines.append("no layout of so many ranks fits; take more ranks, a window, a low rank or fewer features")
    elif (quickest.layout, quickest.micro_batches) != (asked.layout, asked.micro_batches):
        lines.append(f"quickest that fits: {_options(quickest)}: {_short(quickest.seconds)} a step")
    return "\n".join(lines)


def _options(plan: MeshPlan) -> str:
    options = f"--feature-ranks {plan.layout.n_feature} --micro-batches {plan.micro_batches}"
    return options + (" --shard-model" if plan.layout.shard_model else "")


def _sent(plan: MeshPlan, name: str) -> str:
    return f"{size_text(int(plan.sent[name]))} in {_short(plan.sending[name])}"


def _room(machine: Machine) -> str:
    return "?" if machine.memory is None else size_text(machine.memory)


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
