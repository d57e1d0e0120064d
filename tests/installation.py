"""Check an installation, beside whatever torch it is: `python tests/installation.py kernels|pure`.

Runs `doctor`, attaches the demonstration model, records texts, and steers by a plan. The word says what was installed:
a package with compiled kernels, or one without. Needs the extra `hf`, and nothing of the tests.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main(expected: str) -> None:
    sys.path = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parents[1]]
    import torch

    import moe_route as mr
    from moe_route.data import load_demo_model

    place = Path(mr.__file__).parent
    compiled = importlib.util.find_spec("moe_route._C") is not None
    assert compiled == (expected == "kernels"), f"{place} has {'' if compiled else 'no '}kernels"
    health = mr.doctor()
    assert health.ok, health

    model, tokenizer = load_demo_model()
    batch = tokenizer(["The last bus leaves at nine.", "She reads."], padding=True, return_tensors="pt")
    with torch.inference_mode():
        before = model(**batch).logits
        with mr.attach(model) as routed:
            with routed.record() as recorder:
                model(**batch)
            free = recorder.statistics().token_sum("counts").sum(0)  # [layer, expert]
            busiest = free.argmax(-1)
            plan = mr.Plan.forbid({layer: [int(expert)] for layer, expert in enumerate(busiest)})
            with routed.record() as recorder, routed.steer(plan):
                model(**batch)
            steered = recorder.statistics().token_sum("counts").sum(0)
        assert torch.equal(model(**batch).logits, before), "detach left something behind"
    chosen = int(batch["attention_mask"].sum()) * model.config.num_experts_per_tok
    for counts in (free, steered):
        assert (counts.sum(-1) == chosen).all(), "a padded token was counted, or one of the text was not"
    assert all(counts[expert] == 0 for counts, expert in zip(steered, busiest, strict=True)), "the plan did not act"
    print(f"{place}: moe-route {mr.__version__} beside torch {torch.__version__} records and steers")


if __name__ == "__main__":
    if sys.argv[1:] not in (["kernels"], ["pure"]):
        sys.exit(__doc__)
    main(sys.argv[1])
