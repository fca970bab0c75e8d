"""The real DeepSpeed engine under ZeRO-3, one and two ranks, against plain torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run_program(ranks: int, *cases: str) -> dict:
    """What `engine_program` found on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.train.engine.engine_program", *cases],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,  # against a hang; a slow machine takes 500 s
    )
    lines = [line for line in done.stdout.splitlines() if "RESULTS " in line]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return json.loads(lines[0].split("RESULTS ", 1)[1])


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def results(request) -> dict:
    return run_program(request.param)


def test_gradients_equal_plain_torch(results):
    """Both stages, with and without checkpointing, mixed, one rank without images, no image at all, image norm."""
    cases = {name: value for name, value in results.items() if name.startswith(("pretrain/", "finetune/"))}
    assert len(cases) == (16 if results["world"] == 2 else 12)
    assert {name: value for name, value in cases.items() if not value < 1e-5} == {}


@pytest.mark.parametrize(
    "name",
    [
        "partitioned", "kept_whole", "frozen_kept_whole", "packed", "by_tokens", "compiled",
        "lora", "lora_kept_whole", "lora_compiled",
    ],
)  # fmt: skip
def test_three_steps_with_accumulation_and_clipping_equal_plain_torch(results, name):
    assert results[f"trajectory/{name}/grad_norm"] < 3e-5
    assert results[f"trajectory/{name}/weights"] < 2e-5


def test_gradients_rounded_between_the_ranks_give_nearly_the_same_steps(results):
    assert 1e-7 < results["trajectory/reduced_in_bf16/grad_norm"] < 2e-2
    assert results["trajectory/reduced_in_bf16/weights"] < 2e-3


def test_pretraining_leaves_llm_and_vision_bit_identical(results):
    assert results["frozen_bit_identical"] and results["connector_moved"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pretraining_has_no_graph_below_the_first_placed_layer(results, checkpointing):
    """Placed are layers 1 and 3 of four: no backward through layer 0, the embeddings and the vision encoder."""
    expected = {"vision": False, "0": False, "1": True, "2": True, "3": True}
    assert results[f"graph/{checkpointing}"] == expected
    fetched = results[f"fetched/{checkpointing}"]
    assert not [name for name in fetched if name.startswith(("llm.model.layers.0", "llm.model.embed", "vision"))]
    assert any(name.startswith("llm.model.layers.1.") for name in fetched)  # the watch does see gathers


def test_a_parameter_unused_in_a_step_keeps_no_stale_gradient(results):
    assert results["stale"] < 1e-6


def test_nan_on_one_rank_skips_the_step_everywhere_and_ends_the_run_if_it_stays(results):
    assert results["nan_applied"] is False
    assert results["nan_weights_untouched"]
    assert "2 steps in a row had a non-finite gradient" in results["nan_error"]


def test_any_use_may_come_first(results):
    """All encoders and connectors, ZeRO 0 to 3: answers, a loss or features before the first step."""
    cases = {name: value for name, value in results.items() if name.startswith("order/")}
    assert len(cases) == 8 + 4 + 3 * 2  # the SigLIP cases under ZeRO-3 begin in all four ways
    assert {name: value for name, value in cases.items() if not value < 1e-5} == {}


def test_a_checkpoint_loads_weights_only_in_every_stage_and_precision(results):
    cases = {name: value for name, value in results.items() if name.startswith("checkpoint/")}
    assert len(cases) == 9 and set(cases.values()) == {0.0}, cases


def test_what_one_rank_refuses_all_refuse_with_the_same_words(results):
    """None is left to wait for the others in a collective."""
    refusals = results["refusals"]
    assert len(refusals) == results["world"] and all(said == refusals[0] for said in refusals)
    identity, planted = refusals[0]
    assert "belongs to another llm (fingerprint x, here y)" in identity
    assert ".pt holds `posix.system`" in planted and "nothing of it was run" in planted


def test_a_checkpoint_written_in_the_background_holds_the_step_it_names(results):
    """Training goes on and ends as without; the checkpoint has its name only when all ranks have written."""
    cases = {name: value for name, value in results.items() if name.startswith("background/")}
    expected = {"same": True, "published": [True, True, False, False], "moved": [True, True]}
    assert len(cases) == 4 and all(value == expected for value in cases.values()), cases
