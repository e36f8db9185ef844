"""Memory that is saved in whole runs: the same bits, a budget that is kept and told, an error that helps."""

from pathlib import Path

from train.test_exactness import plan, trail
from train.tiny_runs import recipe, splits

from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.recipe import ModelSpec
from shoal.run.run import Run


def events(result: dict, name: str) -> list[dict]:
    return [event for event in Run(Path(result["run_dir"])).events() if event["event"] == name]


def wide(**changes):
    """Activations of more than a page, more than all that is not counted."""
    spec = ModelSpec(kind="gpt", options={"layers": 4, "heads": 2, "width": 64, "dropout": 0.1})
    return recipe("gpt", model=spec, batch=512, steps=6, **changes)


def test_a_run_with_activations_on_disk_has_the_bits_of_one_without(run, tmp_path):
    memory = MemoryPlan(offload_activations="disk", offload_dir=str(tmp_path))
    plain = run(wide(), 1, data=splits("gpt", 1024))
    result = run(wide(), plan=plan(3, 5, memory=memory), data=splits("gpt", 1024))
    assert result["weights_sha256"] == plain["weights_sha256"]
    assert trail(result) == trail(plain)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("run")] == []


def test_a_budget_is_kept_predicted_and_told(run):
    plain = run(wide(), plan=plan(8, memory=MemoryPlan(peak_bytes="1GiB")), data=splits("gpt", 1024))
    started = events(plain, "started")[0]["memory"]
    assert started["ways"] == {"plain": 4}
    most = started["predicted"][0]
    assert most["peak"] == sum(most[k] for k in ("weights", "gradients", "optimizer", "checkpoint", "data")) + max(
        most["activations"], most["update"]
    )
    budget = most["peak"] - most["activations"] // 2
    for placement in ((8,), (3, 5)):
        saved = run(wide(), plan=plan(*placement, memory=MemoryPlan(peak_bytes=budget)), data=splits("gpt", 1024))
        assert saved["weights_sha256"] == plain["weights_sha256"]
        assert trail(saved) == trail(plain)
        chosen = events(saved, "started")[0]["memory"]
        peaks = [event["memory"]["peaks"] for event in events(saved, "committed")]
        print(chosen, peaks)
        assert chosen["ways"].get("plain", 0) < 4 or len(placement) > 1
        assert len(peaks) == 6
        assert all(len(each) == len(placement) for each in peaks)
        for rank, predicted in enumerate(chosen["predicted"]):
            observed = max(each[rank] for each in peaks)
            assert observed <= predicted["peak"] <= budget
            assert observed >= 0.85 * predicted["peak"]
