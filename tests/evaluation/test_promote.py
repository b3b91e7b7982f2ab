"""Promotion against a real object store, alone and in a race."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import left_out, measured, result_uri
from esvit_core.evaluation.significance import Difference, describe_difference
from esvit_core.registry import champions
from esvit_core.registry.promotion import preview_promotion, promote
from esvit_core.registry.promotion_rule import beats

CONFIG = Config()
CLASSES = ["ant", "bee"]
IMAGES = 10_000


def with_outcomes(result, images=IMAGES, held_out="same"):
    """Add outcomes: of two models the better one is right wherever the other is, so that even 0.1 of a point is shown."""
    correct = {
        model: {key: np.arange(images) < images * value / 100 for key, value in figures.items() if math.isfinite(value)}
        for model, figures in result["results"].items()
    }
    return keep_outcomes(result, pack_outcomes(held_out, correct)) if all(correct.values()) and correct else result


def of_table(first_only, second_only, images):
    """A result of which the trained model alone and the baseline alone are right on so many images, both on half."""
    both = images // 2
    trained = np.repeat(
        [True, False, True, False], [first_only, second_only, both, images - both - first_only - second_only]
    )
    baseline = np.repeat(
        [False, True, True, False], [first_only, second_only, both, images - both - first_only - second_only]
    )
    correct = {"trained": {"knn/20": trained}, "baseline": {"knn/20": baseline}}
    figures = {model: {"knn/20": 100 * each["knn/20"].mean()} for model, each in correct.items()}
    return keep_outcomes(measured("knn/20", figures, CLASSES), pack_outcomes("same", correct))


@pytest.fixture
def make_run(store):
    """Publish what a run leaves for the promotion, and give its URI."""

    def make(name, value=50.0, baseline=40.0, result=None, classes=CLASSES, backbone=True, held_out="same"):
        run = store.uri(f"runs/{name}")
        if result is None:
            result = measured("knn/20", {"trained": {"knn/20": value}, "baseline": {"knn/20": baseline}}, classes)
        if "outcomes" not in result and held_out:
            result = with_outcomes(result, held_out=held_out)
        store.put_json(result_uri(run, "knn"), {"name": "knn"} | result)
        if backbone:
            store.publish(f"{run}/backbone", {"model.safetensors": name.encode()}, "backbone")
        return run

    return make


def champion(store):
    pointer = store.read_pointer(store.uri("pointers/champion"))
    return pointer.value if pointer else None


def with_margin(margin: float, rule: str = "significant") -> Config:
    return Config.from_mapping({"promotion": {"margin": margin, "rule": rule}})


def with_rule(rule: str) -> Config:
    return with_margin(0.0, rule)


def test_the_first_run_wins_if_it_beats_its_own_baseline(store, make_run):
    run = make_run("a", 50, 40)
    decision = promote(run, store, CONFIG)
    assert decision["promoted"] and decision["champion"] is None
    assert "first champion" in decision["reason"] and "40.00 of the baseline" in decision["reason"]
    assert champion(store) | {"run": run, "backbone": f"{run}/backbone", "value": 50.0} == champion(store)
    assert store.get_json(f"{run}/promotion.json") == decision


def test_the_first_run_is_refused_where_training_did_not_help(store, make_run):
    decision = promote(make_run("a", 40, 40), store, CONFIG)
    assert not decision["promoted"]
    assert "no better than the baseline" in decision["reason"]
    assert champion(store) is None


def test_a_better_run_replaces_the_champion_and_remembers_it(store, make_run):
    a, b = make_run("a", 50), make_run("b", 51)
    promote(a, store, CONFIG)
    decision = promote(b, store, CONFIG)
    assert decision["promoted"] and decision["champion"] == {"run": a, "metric": "knn/20", "value": 50.0}
    assert champion(store)["run"] == b
    assert champion(store)["previous"] == f"{a}/backbone"
    assert [entry["run"] for entry in champion(store)["history"]] == [a]


def test_an_equal_run_does_not(store, make_run):
    promote(make_run("a", 50), store, CONFIG)
    decision = promote(make_run("b", 50), store, CONFIG)
    assert not decision["promoted"] and "no better" in decision["reason"]
    assert champion(store)["run"].endswith("/a")


@pytest.mark.parametrize("rule", ["significant", "margin"])
@pytest.mark.parametrize(("value", "wins"), [(50.4, False), (50.5, True), (49.0, False)])
def test_the_margin_has_to_be_reached(store, make_run, value, wins, rule):
    promote(make_run("a", 50), store, with_margin(0.5, rule))
    decision = promote(make_run("b", value), store, with_margin(0.5, rule))
    assert decision["promoted"] is wins
    assert (decision["margin"], decision["rule"]) == (0.5, rule)


def test_the_reason_states_interval_and_number_of_images(store, make_run):
    decision = promote(make_run("a", result=of_table(60, 25, 400)), store, CONFIG)
    assert decision["promoted"]
    assert "knn/20 65.00 against 56.25 of the baseline: +8.75 points, 95 % interval 4." in decision["reason"]
    assert decision["reason"].endswith("p < 0.001, 400 images")
    assert decision["difference"]["decision"] == "better" and decision["difference"]["images"] == 400


def test_a_gain_that_may_be_chance_is_not_promoted_by_default(store, make_run):
    run = make_run("a", result=of_table(30, 20, 300))
    decision = promote(run, store, CONFIG)
    assert not decision["promoted"] and champion(store) is None
    assert decision["reason"].startswith("not shown to be better than the baseline: knn/20 60.00 against 56.67")
    assert decision["reason"].endswith(
        "p = 0.203, 300 images; 300 images are too few to show a difference of this size; about 1,200 would"
    )


def test_with_the_rule_margin_the_points_alone_decide(store, make_run):
    assert promote(make_run("a", result=of_table(30, 20, 300)), store, with_rule("margin"))["promoted"]
    assert not promote(make_run("b", result=of_table(20, 30, 300)), store, with_rule("margin"))["promoted"]


def test_with_the_rule_always_every_measured_run_is_promoted(store, make_run):
    for name, result in (("a", of_table(30, 20, 300)), ("b", of_table(20, 30, 300))):
        decision = promote(make_run(name, result=result), store, with_rule("always"))
        assert decision["promoted"] and "promotion.rule is always" in decision["reason"]
    other = make_run("c", 90, classes=["car", "bus"])
    decision = promote(other, store, with_rule("always"))
    assert decision["promoted"] and "not compared with the champion" in decision["reason"]
    assert not promote(make_run("d", result=left_out("knn/20", "no labels")), store, with_rule("always"))["promoted"]


def test_too_few_images_to_show_anything_are_said_to_be_so(store, make_run):
    decision = promote(make_run("a", result=of_table(4, 0, 20)), store, CONFIG)
    assert not decision["promoted"]
    assert (
        "20 images are too few to show anything: the two differ on 4, and must differ on at least 6; about"
        in decision["reason"]
    )


@pytest.mark.parametrize(
    ("held_out", "reason"),
    [
        ("other", "the two were measured on different held-out images"),
        ("", "the outcomes of the single images were not kept"),
    ],
)
def test_a_champion_without_outcomes_of_the_same_images_has_no_interval(store, make_run, held_out, reason):
    promote(make_run("a", 50, held_out=held_out), store, with_rule("margin"))
    decision = promote(make_run("b", 60), store, CONFIG)
    assert not decision["promoted"] and decision["difference"] is None
    assert (
        f"{reason}, so there is no interval; with promotion.rule margin the points alone decide" in decision["reason"]
    )
    assert promote(make_run("c", 60), store, with_rule("margin"))["promoted"]


def test_of_equal_backbones_few_are_promoted():
    from esvit_core.registry.metric_figures import Figure
    from esvit_core.registry.promotion_rule import judge_first

    rng, promoted = np.random.default_rng(3), 0
    for _ in range(300):
        images, share = int(rng.integers(50, 1000)), rng.uniform(0.05, 0.4)
        first, second, _ = rng.multinomial(images // 2, [share, share, 1 - 2 * share])
        result = of_table(first, second, images)
        values = [result["results"][model]["knn/20"] for model in ("trained", "baseline")]
        promoted += judge_first(Figure(*values, "task", "knn/20", result, "trained"), CONFIG).promoted
    assert promoted / 300 <= 0.05


def test_a_margin_is_decimal_not_binary():
    assert beats(33.1, 33.0, 0.1)
    assert not beats(33.0, 33.0, 0.0)


def test_a_metric_that_was_left_out_is_not_promoted(store, make_run):
    decision = promote(make_run("a", result=left_out("knn/20", "the images have no labels")), store, CONFIG)
    assert not decision["promoted"]
    assert decision["reason"] == "knn/20 was left out: the images have no labels"
    assert decision["value"] is None


@pytest.mark.parametrize(
    ("metric", "message"),
    [("knn/7", "knn has knn/20"), ("linear", "no result linear"), ("transfer/digits", "no result transfer-digits")],
)
def test_a_metric_that_was_not_measured_is_not_promoted(store, make_run, metric, message):
    config = Config.from_mapping({"promotion": {"metric": metric}})
    decision = promote(make_run("a"), store, config)
    assert not decision["promoted"] and message in decision["reason"]


def test_a_figure_that_is_not_a_number_is_not_promoted(store, make_run):
    decision = promote(make_run("a", float("nan")), store, CONFIG)
    assert not decision["promoted"] and "not a number" in decision["reason"]


def test_a_run_without_a_backbone_is_not_promoted(store, make_run):
    decision = promote(make_run("a", backbone=False), store, CONFIG)
    assert not decision["promoted"] and "no backbone" in decision["reason"]


def test_other_classes_do_not_compare(store, make_run):
    promote(make_run("a", 50), store, CONFIG)
    decision = promote(make_run("b", 90, classes=["car", "bus"]), store, CONFIG)
    assert not decision["promoted"] and "other classes" in decision["reason"]


def test_another_metric_is_looked_up_in_the_champion_s_run(store, make_run):
    both = {"knn/20": 50.0, "knn/10": 60.0}
    base = {"knn/20": 40.0, "knn/10": 40.0}
    promote(make_run("a", result=measured("knn/20", {"trained": both, "baseline": base}, CLASSES)), store, CONFIG)
    higher = {"knn/20": 10.0, "knn/10": 61.0}
    run = make_run("b", result=measured("knn/20", {"trained": higher, "baseline": base}, CLASSES))
    decision = promote(run, store, Config.from_mapping({"promotion": {"metric": "knn/10"}}))
    assert decision["promoted"] and "61.00 against 60.00" in decision["reason"]


def test_a_repeated_step_returns_the_decision(store, make_run):
    run = make_run("a")
    first = promote(run, store, CONFIG)
    assert promote(run, store, CONFIG) == first


def test_a_step_that_died_after_the_change_does_not_compare_the_run_with_itself(store, make_run):
    run = make_run("a", 50)
    reason = promote(run, store, CONFIG)["reason"]
    store.remove(f"{run}/promotion.json")
    again = promote(run, store, CONFIG)
    assert again["promoted"] and again["reason"] == reason


def test_a_step_that_died_is_recognised_even_when_another_run_has_won_since(store, make_run):
    a, b = make_run("a", 50), make_run("b", 60)
    promote(a, store, CONFIG)
    store.remove(f"{a}/promotion.json")
    promote(b, store, CONFIG)
    assert promote(a, store, CONFIG)["promoted"]
    assert champion(store)["run"] == b


def test_the_history_is_bounded(store, make_run, monkeypatch):
    monkeypatch.setattr(champions, "HISTORY", 3)
    for i in range(6):
        promote(make_run(f"r{i}", 50 + i), store, CONFIG)
    assert [entry["run"][-2:] for entry in champion(store)["history"]] == ["r2", "r3", "r4"]
    assert all("history" not in entry for entry in champion(store)["history"])


def test_of_runs_that_finish_together_the_best_ends_as_champion(store, make_run):
    runs = [make_run(f"r{value}", value) for value in range(45, 53)]
    with ThreadPoolExecutor(len(runs)) as pool:
        decisions = list(pool.map(lambda run: promote(run, store, CONFIG), runs))
    assert champion(store)["run"] == runs[-1]
    assert decisions[-1]["promoted"]
    winners = [run for run, decision in zip(runs, decisions, strict=True) if decision["promoted"]]
    # Whoever was promoted is in the chain, in rising order; whoever was not lost to one who is.
    assert [entry["run"] for entry in champion(store)["history"]] == [r for r in runs if r in winners][:-1]
    assert all(d["champion"]["run"] in winners for d in decisions if not d["promoted"])


def test_the_loser_of_a_race_is_compared_again_and_says_so(store, make_run, monkeypatch):
    slow, quick = make_run("slow", 50), make_run("quick", 55)
    swap, pending = store.swap_pointer, [quick]

    def overtaken(*args):
        if pending:
            promote(pending.pop(), store, CONFIG)
        return swap(*args)

    monkeypatch.setattr(store, "swap_pointer", overtaken)
    decision = promote(slow, store, CONFIG)
    assert not decision["promoted"]
    assert decision["reason"].startswith("another run became champion in the meantime; no better")
    assert champion(store)["run"] == quick


def test_a_pointer_that_never_rests_is_reported(store, make_run, monkeypatch):
    monkeypatch.setattr(store, "swap_pointer", lambda *args: False)
    with pytest.raises(UserError, match="run the step again"):
        promote(make_run("a"), store, CONFIG)


def test_foresight_tells_the_decision_and_changes_nothing(store, make_run):
    first, worse = make_run("a", 50, 40), make_run("b", 45, 40)
    assert preview_promotion(first, store, CONFIG)["promoted"] and champion(store) is None
    decision = promote(first, store, CONFIG)
    assert preview_promotion(first, store, CONFIG) == decision | {"decided": True}
    before = preview_promotion(worse, store, CONFIG)
    assert not before["promoted"] and not before["decided"]
    assert before["reason"] == promote(worse, store, CONFIG)["reason"]


def text(difference):
    return describe_difference(Difference.from_json(difference))


def transfers(store, run, images=IMAGES, **values):
    """Give a run results on transfer sets, and the configuration that names them."""
    for name, value in values.items():
        figures = {model: {f"transfer/{name}": value} for model in ("trained", "baseline")}
        result = with_outcomes(measured(f"transfer/{name}", figures, CLASSES), images)
        store.put_json(result_uri(run, f"transfer-{name}"), {"name": f"transfer-{name}"} | result)
    sets = [{"name": name, "source": "unused"} for name in values]
    return Config.from_mapping({"evaluation": {"transfer": sets}, "promotion": {"max_loss": 2.0}})


@pytest.mark.parametrize(("digits", "wins"), [(78.0, True), (77.9, False)])
def test_a_set_that_loses_more_than_is_allowed_blocks(store, make_run, digits, wins):
    a, b = make_run("a", 50), make_run("b", 55)
    config = transfers(store, a, digits=80.0, flags=60.0)
    promote(a, store, config)
    transfers(store, b, digits=digits, flags=70.0)
    decision = promote(b, store, config)
    assert decision["promoted"] is wins and decision["max_loss"] == 2.0
    assert decision["figures"]["transfer/digits"] == {"run": digits, "champion": 80.0}
    assert decision["figures"]["knn/20"] == {"run": 55.0, "champion": 50.0}
    if not wins:
        assert decision["reason"] == (
            f"better: knn/20 55.00 against 50.00 of the champion {a}: {text(decision['difference'])}; "
            f"but transfer/digits fell to 77.90: {text(decision['differences']['transfer/digits'])}, more than the allowed 2"
        )
        assert champion(store)["run"] == a


def test_a_loss_that_may_be_chance_blocks_only_with_the_rule_margin(store, make_run):
    a, b, c = make_run("a", 50), make_run("b", 55), make_run("c", 60)
    config = transfers(store, a, images=100, digits=80.0)
    promote(a, store, config)
    for run in (b, c):
        transfers(store, run, images=100, digits=76.0)  # the models differ on four images
    points = config.model_copy(update={"promotion": config.promotion.model_copy(update={"rule": "margin"})})
    blocked = promote(c, store, points)
    assert not blocked["promoted"] and "transfer/digits fell by 4.00 points to 76.00" in blocked["reason"]
    assert promote(b, store, config)["promoted"]


def test_a_set_that_the_champion_was_not_measured_on_blocks_nothing(store, make_run):
    promote(make_run("a", 50), store, CONFIG)
    b = make_run("b", 55)
    decision = promote(b, store, transfers(store, b, digits=1.0))
    assert decision["promoted"] and decision["figures"]["transfer/digits"] == {"run": 1.0, "champion": None}


def test_without_a_bound_a_set_may_fall(store, make_run):
    a, b = make_run("a", 50), make_run("b", 55)
    config = transfers(store, a, digits=80.0)
    promote(a, store, config)
    transfers(store, b, digits=10.0)
    free = config.model_copy(update={"promotion": config.promotion.model_copy(update={"max_loss": None})})
    assert promote(b, store, free)["promoted"]
