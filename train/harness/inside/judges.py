"""Local rules in place of paid judges, for lmms-eval's own results. Runs in lmms-eval's environment."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.hallusion_bench.evaluate_hb import hb_aggregation_result_intern
from lmms_eval.tasks.mmbench.cc_utils import mmbench_evaluator


def ccbench(results: list[dict[str, Any]]) -> float:
    """Percent right by the static rule of MMBench, which lmms-eval has for English alone."""
    overall, _, _ = mmbench_evaluator.eval_result(results, eval_method="static")
    return float(overall) * 100


def hallusion_all(results: list[dict[str, Any]]) -> float:
    """Percent of right questions."""
    return _hallusion(results, "aAcc")


def hallusion_figure(results: list[dict[str, Any]]) -> float:
    """Percent of figures all of whose questions are right."""
    return _hallusion(results, "fAcc")


def hallusion_question(results: list[dict[str, Any]]) -> float:
    """Percent of questions that are right for all of their figures."""
    return _hallusion(results, "qAcc")


def _hallusion(results: list[dict[str, Any]], metric: str) -> float:
    return float(hb_aggregation_result_intern(results, metric)) * 100
