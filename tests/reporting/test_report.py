"""The report of a run in a real object store: what it says, and that it is one sound file."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from esvit_core.config import Config
from esvit_core.data.loading.augment import MultiCrop, sample_rng
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import measured, result_uri
from esvit_core.evaluation.significance import accuracy_difference
from esvit_core.registry.promotion import promote
from esvit_core.reporting.figures import figures_of_run
from esvit_core.reporting.property_rows import recipe_rows, training_rows
from esvit_core.reporting.report import write_report
from esvit_core.reporting.run_records import read_run_records
from esvit_core.reporting.verdict import judge
from esvit_core.runs.events import read_events
from esvit_core.storage import ObjectStore, StoreAddress, StoreError
from esvit_core.storage.retry import RetryPolicy

VOID = {"meta", "img", "br", "hr", "link", "input"}
ESCAPED = "<b>bugs</b> & more"


class Page(HTMLParser):
    """The elements of a page; refuses tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self._hidden = 0
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag not in ("b", "bdi", "small", "span", "a"):
            self.text += " "

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


def of_outcomes(trained: list[bool], baseline: list[bool]) -> dict:
    """A result of 20-NN with the outcome of every image."""
    correct = {"trained": {"knn/20": np.array(trained)}, "baseline": {"knn/20": np.array(baseline)}}
    figures = {model: {"knn/20": 100 * float(each["knn/20"].mean())} for model, each in correct.items()}
    return keep_outcomes(measured("knn/20", figures, []), pack_outcomes("images", correct))


@pytest.fixture(scope="session")
def page(finished_html) -> Page:
    """The report of the finished run."""
    return Page(finished_html)


@pytest.fixture
def written(store):
    """A function that writes the report of a run and reads it as a page."""
    return lambda run: Page(write_report(run.uri, store, run.config))


def output(page: Page) -> str:
    return " ".join(page.text.split())


def test_the_numbers_shown_are_the_results(finished_run, page):
    labels = {
        "10-NN": "knn/10",
        "20-NN": "knn/20",
        "linear probe": "linear",
        "linear probe, best epoch": "linear/best",
        "transfer to digits": "transfer/digits",
    }
    for label, key in labels.items():
        trained, baseline = (f"{value:.1f}" for value in finished_run.figures[key])
        difference = f"{float(trained) - float(baseline):+.1f}".replace("-", "\N{MINUS SIGN}")
        assert page.row(label)[1:4] == [trained, baseline, difference]
    assert page.row("20-NN")[5] == "81.5"


def test_every_difference_has_its_interval_as_text_and_as_a_bar(finished_run, shared_store, page):
    shown = {}
    for name in ("knn", "linear", "transfer-digits"):
        shown |= shared_store.get_json(result_uri(finished_run.uri, name))["differences"]
    labels = {"knn/10": "10-NN", "knn/20": "20-NN", "linear": "linear probe", "transfer/digits": "transfer to digits"}
    assert shown.keys() == labels.keys()
    for key, label in labels.items():
        low, high = (f"{bound:.1f}".replace("-", "\N{MINUS SIGN}") for bound in shown[key]["interval"])
        assert page.row(label)[4].split() == [*f"{low} to {high}".split(), *shown[key]["decision"].split()]
    bars = [svg for svg in page.all("svg") if (svg.get("class") or "").startswith("interval")]
    assert [svg["class"].split()[1] for svg in bars] == ["good", "good", "good", "plain"]
    assert all("95 % interval" in svg["aria-label"] for svg in bars)
    assert page.row("linear probe, best epoch")[4].split() == ["not", "tested"]


def test_only_better_is_green(page):
    tiles = {(li.get("class") or "") for li in page.all("li") if "tile" in (li.get("class") or "")}
    assert tiles == {"tile good", "tile plain"}  # the digits fell by 2.5 points, which may be chance


def test_the_verdict_comes_first_and_is_in_words(make_run, store, written):
    run = make_run()
    store.put_json(
        result_uri(run.uri, "knn"),
        {"name": "knn"} | of_outcomes([True] * 400 + [False] * 100, [True] * 150 + [False] * 350),
    )
    text = output(written(run))
    assert "Pre-training helped: 20-NN rose from 30.0 % to 80.0 %, by 50.0 points." in text
    assert text.index("Pre-training helped") < text.index("Summary") < text.index("Results Frozen features")
    found = accuracy_difference(np.arange(500) < 400, np.arange(500) < 150)
    interval = f"{found.low:.1f} to {found.high:.1f} points"
    assert f"The 95 % interval of the difference is {interval}, measured on 500 held-out images (p < 0.001)." in text


def test_a_difference_within_chance_is_stated_as_such(make_run, store, written):
    run = make_run(drawings=False)
    trained, baseline = ([True] * few + [False] * (80 - few) for few in (31, 27))
    chance = of_outcomes(trained, baseline[::-1])
    store.put_json(result_uri(run.uri, "knn"), {"name": "knn"} | chance)
    text = output(written(run))
    assert "No difference shown: 20-NN rose from 33.8 % to 38.8 %, which may be chance." in text
    assert "80 images are too few to show a difference of this size; about 2,300 would." in text


def test_data_sets_are_counted_once_each(page):
    text = output(page)
    assert "Pre-training helped: 20-NN rose from 30.7 % to 34.9 %, by 4.2 points." in text
    assert "Better than the baseline on 1 of 2 data sets; no difference shown on 1." in text


def test_a_result_without_outcomes_is_not_called_better(make_run, store, written):
    run = make_run(drawings=False)
    old = measured("knn/20", {"trained": {"knn/20": 80.0}, "baseline": {"knn/20": 30.0}}, run.classes)
    store.put_json(result_uri(run.uri, "knn"), {"name": "knn"} | old)
    page = written(run)
    assert "20-NN rose from 30.0 % to 80.0 %; whether this is chance was not tested." in output(page)
    assert "the outcomes of the single images were not kept" in output(page)
    assert page.row("20-NN")[3:5] == ["+50.0", "not tested"]


def test_the_verdict_is_in_the_event_log(finished_run, shared_store):
    event = next(e for e in read_events(shared_store, finished_run.uri) if e.kind == "evaluated")
    assert event.component == "report" and event.reason.startswith("Pre-training helped: 20-NN rose from 30.7 % to")
    assert event.facts is not None and event.facts["differences"].keys() == {"knn/20", "transfer/digits"}
    assert event.facts["differences"]["knn/20"]["decision"] == "better"


def test_the_figures_for_kubeflow_have_interval_p_value_number_and_verdict(finished_run, shared_store):
    figures = figures_of_run(finished_run.uri, shared_store)
    kept = shared_store.get_json(result_uri(finished_run.uri, "knn"))["differences"]["knn/20"]
    named = {name: figures[f"knn/20 ({name})"] for name in ("difference", "low", "high", "p", "images", "verdict")}
    assert named == {
        "difference": kept["points"],
        "low": kept["interval"][0],
        "high": kept["interval"][1],
        "p": kept["p"],
        "images": 1600,
        "verdict": "better",
    }
    assert figures["transfer/digits (verdict)"] == "no difference shown" and "knn/10 (verdict)" not in figures


def test_a_run_that_started_from_other_weights_says_so(finished_run, shared_store):
    init = {"source": "s3://esvit/runs/a/backbone", "sha256": "ab" * 32}
    config = Config.from_mapping({**finished_run.config.model_dump(mode="json"), "init": init})
    message = "the backbone of s3://esvit/runs/a/backbone (SHA-256 abababababab)"
    records = read_run_records(finished_run.uri, shared_store, config)
    rows = {row.name: (row.value, row.published) for row in recipe_rows(records)}
    assert rows["initial weights"] == (message, "drawn from the seed")
    assert f"The baseline is the network as this run started: {message}." in judge(records).details


def test_the_recipe_lists_what_was_taken_from_other_weights_and_what_was_not(finished_run, shared_store):
    resized = [f"layers.{i}.relative_position_bias_table (13, 13)" for i in range(8)]
    record = {
        "loaded": ["the backbone"],
        "entries": 1173,
        "resized": resized,
        "initialized": ["the heads", "the optimizer"],
        "ignored": [],
    }
    records = replace(read_run_records(finished_run.uri, shared_store, finished_run.config), initial=record)
    rows = {row.name: row.value for row in recipe_rows(records)}
    assert rows["initial weights, taken"] == "the backbone (1,173 entries)"
    assert rows["initial weights, resized"] == ", ".join(resized[:6]) + " and 2 more"
    assert rows["initial weights, drawn from the seed"] == "the heads, the optimizer"
    assert rows["initial weights, ignored in the source"] == "none"


def test_waiting_for_data_is_shown_with_the_setting_that_helps(finished_run, shared_store):
    records = read_run_records(finished_run.uri, shared_store, finished_run.config)
    for share, expected in ((0.01, "1.0 %"), (0.3, "30.0 %; raise training.workers")):
        rows = {row.name: row.value for row in training_rows(records.training.value, [{"data_wait": share}])}
        assert rows["time spent waiting for data"] == expected


def test_a_loss_is_not_hidden(make_run, store, written):
    run = make_run(results=False)
    worse = of_outcomes([True] * 60 + [False] * 140, [True] * 120 + [False] * 80)
    store.put_json(result_uri(run.uri, "knn"), {"name": "knn"} | worse)
    text = output(written(run))
    assert "Pre-training did not help: 20-NN fell from 60.0 % to 30.0 %, by 30.0 points." in text
    assert "No candidate for promotion." in text and "no better than the baseline" in text.lower()


def test_the_report_is_stored_and_small(finished_run, finished_html, shared_store):
    assert shared_store.get_bytes(f"{finished_run.uri}/report/report.html").decode() == finished_html
    assert len(finished_html) < 3_000_000


def test_the_page_loads_nothing_and_runs_nothing(page, finished_html):
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "data", "srcset", "poster"):
            value = attributes.get(name) or ""
            if value.startswith("https://"):
                assert (tag, value) == ("a", "https://arxiv.org/abs/2106.09785")
            else:
                assert value == "" or value.startswith(("data:image/", "#"))
    assert "@import" not in finished_html
    assert not re.findall(r"url\((?!#)", finished_html)
    assert "default-src 'none'" in finished_html


def test_names_of_classes_and_files_are_text(page, finished_html):
    for raw in ("<script", "<b>bugs", "<regions>"):
        assert raw not in finished_html
    assert ESCAPED in output(page)
    assert "broken <script>.png" in output(page)
    assert "Lines join <regions>." in page.text
    chart = next(
        svg for svg in page.all("svg") if (svg.get("aria-label") or "").startswith("Confusion matrix of 3 classes")
    )
    assert chart["role"] == "img"


def test_the_page_is_sound_and_accessible(page):
    assert page.all("html")[0]["lang"] == "en"
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in page.elements:
        link = attributes.get("href") or ""
        assert not link.startswith("#") or link[1:] in names
    assert all(image.get("alt") for image in page.all("img"))
    assert all(svg.get("aria-label") for svg in page.all("svg") if svg.get("class") == "chart")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(header.get("scope") for header in page.all("th"))


def test_the_data_are_described(finished_run, shared_store, page):
    splits = Manifest.read(shared_store, f"{finished_run.uri}/data").splits
    counts = f"training images {splits['train'].samples} held-out images {splits['val'].samples}"
    for message in (counts, "classes 3", "bad files 6", "clipart", "sizes, pixels", "mean color", "identical images"):
        assert message in output(page)
    names = next(row for row in page.rows if "empty.jpg" in row[-1])
    assert names[1] == "3"


def test_the_crops_are_those_of_the_first_epoch(finished_run, shared_store, page):
    config = finished_run.config
    shown = [img for img in page.all("img") if (img["alt"] or "").startswith("global crop 1 of ")]
    assert len(shown) == 6
    assert len([img for img in page.all("img") if (img["alt"] or "").startswith("local crop")]) == 12
    dataset = ShardDataset(shared_store, f"{finished_run.uri}/data", "train")
    wanted = (shown[0]["alt"] or "").removeprefix("global crop 1 of ")
    index = next(i for i in range(len(dataset)) if dataset.name(i) == wanted)
    crop = MultiCrop(config.augment)(dataset.image(index), sample_rng(config.seed, 0, index))[0].numpy()
    pixels = crop.transpose(1, 2, 0) * config.augment.std + config.augment.mean
    data = base64.b64decode((shown[0]["src"] or "").partition("base64,")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.rint(pixels * 255).astype(np.uint8))


def test_the_training_is_drawn_and_resumes_are_marked(page):
    labels = " ".join(svg.get("aria-label") or "" for svg in page.all("svg"))
    for title in (
        "Loss.",
        "Prototypes in use.",
        "Divergence from the mean distribution.",
        "Spread of the features.",
        "Learning rate.",
    ):
        assert title in labels
    for title in ("Teacher temperature.", "Teacher momentum.", "Speed."):
        assert title in labels
    text = output(page)
    assert "resumed from the checkpoint at step 150" in text
    assert "Dashed vertical lines" in text
    assert "time 3:08" in text and "speed 341 images/s" in text


def test_missing_records_are_named_with_the_reason(page):
    text = output(page)
    assert "transfer to shapes: not measured: there is no result in the store" in text
    assert "attention: resnet50 has no attention" in text
    left_out = text[text.index("Omissions and limitations") :]
    remark = "k-NN, linear probe: 1 class with a single training image: fruit."
    for what in ("transfer to shapes", "attention", "6 files of the source", remark):
        assert what in left_out


def test_a_run_without_labels_says_what_could_not_be_measured(make_run, written):
    text = output(written(make_run(classes=[], resumes=())))
    assert "No difference shown: Transfer to digits fell from 91.0 % to 88.5 %, which may be chance." in text
    assert "interruptions none" in text and "Dashed vertical lines" not in text
    assert "classes none (unlabelled)" in text
    assert "20-NN: not measured: the images have no labels" in text
    assert "the linear probe, which was not measured: the images have no labels" in text


def test_without_any_measure_the_verdict_says_so(make_run, store, written):
    run = make_run(classes=[])
    store.remove_prefix(f"{run.uri}/evaluation")
    text = output(written(run))
    assert "A backbone was trained, but the quality of its features could not be measured." in text
    assert "52.5 % of the regions find their true match in another crop; 31.2 % do for the baseline" in text


def test_a_run_without_a_training_log(make_run, store, written):
    run = make_run()
    store.remove_prefix(f"{run.uri}/training/log")
    text = output(written(run))
    assert "training has written no log: training/log is empty" in text
    assert "final loss 5.432" in text


def test_a_run_that_is_not_finished(make_run, written):
    text = output(written(make_run(training=False, results=False, drawings=False)))
    assert "This run is not finished. " in text
    for reason in (
        "training is not finished: training/summary.json is missing",
        "no backbone is published",
        "no figures were drawn",
    ):
        assert reason in text


def test_an_empty_run_still_gives_a_page(store, config):
    page = Page(write_report(store.uri("runs/nothing"), store, config))
    assert "no data were prepared: data/manifest.json is missing" in output(page)


def test_damaged_records_are_named_and_do_not_stop_the_report(make_run, store, written):
    run = make_run()
    store.put_json(f"{run.uri}/training/summary.json", {"unknown": 1})
    store.put_bytes(f"{run.uri}/backbone/backbone.json", b"{")
    text = output(written(run))
    assert "not a training summary of this version" in text
    assert "backbone.json: not JSON" in text


def test_a_store_that_does_not_answer_is_an_error_not_an_empty_report(config):
    address = StoreAddress("127.0.0.1:9", "key", "secret")
    with pytest.raises(StoreError):
        write_report("s3://bucket/runs/a", ObjectStore(address, RetryPolicy(attempts=1)), config)


def test_a_fit_that_did_not_converge_is_named_beside_its_figure(make_run, store, written):
    run = make_run(drawings=False)
    uri = result_uri(run.uri, "transfer-digits")
    store.put_json(uri, store.get_json(uri) | {"unconverged": {"transfer/digits": ["trained"]}})
    text = output(written(run))
    assert "transfer to digits (trained: fit not converged) 88.5" in text
    assert "lambda trained 0.75, baseline 1, chosen by validation on the images to fit." in text


def test_the_promotion_is_previewed(page):
    text = output(page)
    assert (
        "Candidate for promotion to champion. First champion: knn/20 34.94 against 30.69 of the baseline: +4.25 points"
        in text
    )
    assert "the promote step, which follows, decides" in text


def test_a_recorded_decision_and_an_unknown_evaluation_are_shown(make_run, store, written):
    run = make_run(drawings=False)
    promote(run.uri, store, run.config)
    other = measured("robustness", {"trained": {"robustness": 12.5}, "baseline": {"robustness": 10.0}}, [])
    store.put_json(result_uri(run.uri, "robustness"), {"name": "robustness"} | other)
    page = written(run)
    assert "Promoted: this is the current champion. First champion" in output(page)
    assert page.row("robustness")[1:4] == ["12.5", "10.0", "+2.5"]


def test_warnings_of_the_diagnostics_are_shown_with_their_step(page):
    assert "Step 100: the same distribution for every <image>; lower objective.teacher_temp." in output(page)


def test_the_lineage_is_complete(finished_run, page):
    text = output(page)
    config: Config = finished_run.config
    for message in (finished_run.uri, config.digest(), "torch 2.14.1", "Example CPU, 2 cores", "c0ffee", "0123abc"):
        assert message in text


def test_the_whole_recipe_is_there(finished_run, page):
    assert finished_run.config.to_yaml().strip() in page.text
    assert page.row("prototypes K") == ["prototypes K", "512", "65,536"]
    assert page.row("objective") == ["objective", "view + region", "same"]
    assert page.all("details")


def test_use_and_citation_are_there(finished_run, page):
    assert f'backbone = esvit_core.load_backbone("{finished_run.uri}/backbone")' in page.text
    assert "@inproceedings{li2022esvit" in page.text
