"""`vllm-medusa bench --profile-steps`: step costs on this machine."""

from __future__ import annotations

from dataclasses import asdict

from vllm_medusa.bench.engines import has_room
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.results import STEP_COSTS
from vllm_medusa.bench.spread import spread
from vllm_medusa.engines.engine import EngineProcess, has_accelerator
from vllm_medusa.engines.process import EngineProcessError
from vllm_medusa.errors import UserError
from vllm_medusa.files import write_json
from vllm_medusa.heads import load_heads
from vllm_medusa.reporting.progress import Bar
from vllm_medusa.reporting.tables import Table, as_text
from vllm_medusa.stepcost.costs import StepCosts
from vllm_medusa.stepcost.measure import measure_step_costs, trees_to_measure
from vllm_medusa.stepcost.stages import measure_stages, stage_table
from vllm_medusa.target.config import read_target
from vllm_medusa.tree.named import default_paths

#: Draft nodes of the trees whose steps are timed, if the heads' own tree has as many.
SIZES = (4, 8, 16, 32, 64)


def profile_steps(plan: Plan) -> str:
    """Time engine steps and their stages; write the costs and return the text to print.

    ``vllm-medusa calibrate --step-costs`` reads the file.

    Raises:
        UserError: unusable heads, or an engine that does not start.
    """
    settings = plan.settings
    heads = settings.heads or settings.model
    target = read_target(settings.model)
    checkpoint = load_heads(
        heads, target_hidden_size=target.hidden_size, target_vocab_size=target.vocab_size
    )
    num_heads = checkpoint.spec.num_heads
    found = checkpoint.tree_paths or default_paths(num_heads, max(SIZES))
    paths = [tuple(path) for path in found]
    sizes = [size for size in SIZES if size <= len(paths)] or [len(paths)]
    trees = trees_to_measure(paths, sizes, num_heads)
    speculative = {"method": "medusa", "model": heads}
    token_ids = [token for prompt in plan.prompts.prompts for token in prompt.token_ids]
    staged = [trees[1], trees[-1]]  # the chain and the largest tree
    turns = len(trees) * len(settings.batch_sizes) * (settings.rounds + 1)
    turns += 2 * len(staged) * len(settings.batch_sizes)
    with Bar("step costs", "runs", turns) as bar:
        costs = measure_step_costs(
            plan.options,
            speculative,
            trees,
            token_ids,
            settings.batch_sizes,
            rounds=settings.rounds,
            engines_at_once=_engines_at_once(plan, len(trees)),
            environment=plan.environment,
            progress=bar.advance,
            provenance=dict(plan.provenance),
        )
        stages = measure_stages(
            plan.options,
            speculative,
            staged,
            token_ids,
            settings.batch_sizes,
            environment=plan.environment,
            progress=bar.advance,
        )
    values = {**costs.to_dict(), "stages": [asdict(times) for times in stages]}
    path = settings.out / STEP_COSTS
    write_json(path, values)
    written = f"written to {path}, which vllm-medusa calibrate reads with --step-costs"
    return "\n".join([as_text([cost_table(costs), stage_table(stages)]), written])


def _engines_at_once(plan: Plan, num_engines: int) -> int:
    """All engines, or one if there is not enough memory or the user says so."""
    if plan.settings.alive != "auto":
        return num_engines if plan.settings.alive == "all" else 1
    if has_accelerator():
        return 1
    with EngineProcess(plan.options, plan.environment) as engine:
        try:
            info = engine.wait()
        except EngineProcessError as exc:
            raise UserError(f"the baseline cannot run: {exc.reason}") from None
    # That engine has ended: all engines must fit into the free memory.
    return num_engines if has_room(info, num_engines) else 1


def cost_table(costs: StepCosts) -> Table:
    """Time of a step by batch size and draft nodes, and over one without speculation."""
    table = Table(
        "Time of a step while the whole batch decodes: median of the rounds (quartiles)",
        ("draft nodes", "leaf paths", "batch", "step ms", "over no speculation"),
        texts=(),
    )
    for batch_size in costs.batch_sizes:
        rows = [row for row in costs.rows if row.batch_size == batch_size]
        base = next(row.round_ms for row in rows if not row.num_drafts)
        for row in rows:
            step = spread(row.round_ms)
            ratio = spread([ms / base_ms for ms, base_ms in zip(row.round_ms, base, strict=True)])
            assert step is not None
            assert ratio is not None
            table.add(
                row.num_drafts,
                row.num_leaves,
                batch_size,
                step.format(2),
                ratio.format(2) if row.num_drafts else "",
            )
    return table
