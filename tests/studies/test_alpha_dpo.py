"""The α-DPO paper in miniature: its statements against algebra, a followed run against the trainer, and the report."""

import json
import math

import alpha_dpo
import miniature
import numpy as np
import pytest
import torch
from alpha_dpo import SETTINGS, VARIANTS
from torch import tensor

import data
import train
from losses import OBJECTIVES


def made_up_pairs(n: int = 6) -> dict[str, torch.Tensor]:
    """logp, ref, kl, length, (n, 2) each, float64."""
    draw = torch.Generator().manual_seed(0)

    def number(low, high):
        return low + (high - low) * torch.rand(n, 2, generator=draw, dtype=torch.float64)

    length = torch.randint(2, 9, (n, 2), generator=draw).double()
    return {"logp": number(-20, -2), "ref": number(-20, -2), "kl": number(0, 3), "length": length}


def loss_of(text: str, x: dict[str, torch.Tensor]) -> torch.Tensor:
    objective = train.parse_objective(text)
    return objective.row_losses({"logp": x["logp"], "kl": x["kl"]}, {"len": x["length"], "ref": x["ref"]}, [0])


# ---- what is run


def test_every_objective_is_understood():
    grids = alpha_dpo.METHODS | alpha_dpo.NO_LENGTHS | alpha_dpo.TOKEN_KL | alpha_dpo.SLIDES
    calls = [text for texts in grids.values() for text in texts]
    calls += [variant(*SETTINGS[of]) for of in SETTINGS for variant in VARIANTS.values()]
    for text in calls:
        train.try_objective(train.parse_objective(text))
    assert len(VARIANTS) == 8 and all(len(column) == 8 for column in alpha_dpo.PAPER_2.values())


@pytest.mark.parametrize("row", VARIANTS)
def test_variants_of_the_reference_at_alpha_0_are_simpo(row):
    x = made_up_pairs()
    gamma = 0.0 if row == "γ = 0" else 0.7
    expected = loss_of(f"simpo(beta=2.0, gamma={gamma})", x)
    assert torch.allclose(loss_of(VARIANTS[row](2.0, 0.7, 0.0), x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", VARIANTS)
def test_variants_of_the_reference_follow_their_definition(row):
    """β log(π_θ(y_w)/π_θ(y_l)) less what the implicit reference says of the pair, per token, its margin standardised."""
    x, (beta, gamma, alpha) = made_up_pairs(), (2.0, 0.7, 0.5)
    policy, reference = (beta * (x[k] / x["length"]).numpy() @ [1, -1] for k in ("logp", "ref"))
    margin = {
        "U": 0 * policy, "Uπ_θ^α": policy, "Uπ_ref^α": reference, "U(1/π_ref)^α": -reference,
    }.get(row, policy - reference)  # fmt: skip
    if row == "without normalisation":
        shift = 0.25 * margin  # α/β
    else:
        shift = alpha * (margin - margin.mean()) / max(margin.std(), 1e-300)
    h = policy - (0.0 if row == "γ = 0" else gamma) - shift
    assert np.allclose(loss_of(VARIANTS[row](beta, gamma, alpha), x), np.log1p(np.exp(-h)), rtol=0, atol=1e-10)


# ---- statements


def test_ranks_and_correlations_by_hand():
    assert alpha_dpo.ranks([3.0, 1.0, 3.0, 7.0]).tolist() == [2.5, 1.0, 2.5, 4.0]
    # 1 − 6 Σd²/(n(n² − 1)) with d = 1, −1, 0
    assert alpha_dpo.spearman([1.0, 2.0, 30.0], [5.0, 4.0, 6.0]) == pytest.approx(1 - 6 * 2 / (3 * 8))
    # deviations (−1, 0, 1) and (−1, 1, 0): 1/√(2·2)
    assert alpha_dpo.pearson([1.0, 2.0, 3.0], [4.0, 6.0, 5.0]) == pytest.approx(0.5)


def test_theorem_3_1():
    """Two pairs, V = 10, β = ½: lengths 3 and 3, then 4 and 2, so γ_i = 0 and −ln 10."""
    logp, length = tensor([[-6.0, -8.0], [-9.0, -5.0]]).double(), tensor([[3.0, 3.0], [4.0, 2.0]]).double()
    t = alpha_dpo.theorem_3_1(logp, length, 10, 0.5)
    log10 = math.log(10)
    assert t["own"] < 1e-12 and t["averaged"] < 1e-12 and t["equal"] == 0.5
    assert [t[k] for k in ("mean", "std", "low", "high")] == pytest.approx([-log10 / 2, log10 / 2, -log10, 0.0])

    def softplus(h):
        return math.log1p(math.exp(-h))

    exact, one = [softplus(1.0), softplus(-2.0 + log10)], [softplus(1 + log10 / 2), softplus(-2 + log10 / 2)]
    assert t["constant"] == pytest.approx(np.abs(np.subtract(exact, one)).mean())


def test_lemma_4_2_by_hand():
    """One pair: A = 2(−1 + 2) − ½ = 1.5, B = 1 − (−1) = 2, α = 0.1."""
    pair = [tensor([values]).double() for values in ([-4.0, -6.0], [-5.0, -5.0], [4.0, 3.0])]
    t = alpha_dpo.lemma_4_2(*pair, 2.0, 0.5, 0.1)
    p = 1 / (1 + math.exp(-1.5))
    assert t["left"] == pytest.approx(math.log1p(math.exp(-1.3)))
    assert t["online"] == pytest.approx(-math.exp(0.2) * math.log(p))
    assert t["correction"] == pytest.approx(0.2 * (math.log(p) - p + 1)) and t["holds"] == 1


def test_lemma_4_2_to_first_order_and_beyond():
    """The two sides part by O(α²); and, pair by pair, the inequality holds far beyond small α."""
    x = made_up_pairs()
    sides = {}
    for alpha in (1e-3, 2e-3):
        t = alpha_dpo.lemma_4_2(x["logp"], x["ref"], x["length"], 2.0, 0.5, alpha)
        sides[alpha] = t["online"] + t["correction"] - t["left"]
    assert sides[1e-3] > 0 and sides[2e-3] / sides[1e-3] == pytest.approx(4, rel=0.05)
    a, b = torch.meshgrid(torch.linspace(-12, 12, 49).double(), torch.linspace(-12, 12, 49).double(), indexing="ij")
    logp = torch.stack([a.flatten(), 0 * a.flatten()], 1)  # one token each, β = 1: A = d; the reference sets B
    ref = logp - torch.stack([b.flatten(), 0 * b.flatten()], 1)
    assert alpha_dpo.lemma_4_2(logp, ref, torch.ones_like(logp), 1.0, 0.0, 1.0)["holds"] == 1


def test_lemma_4_3():
    """Where the token KL is −u exactly, δ is M; and by hand where it is not."""
    x = made_up_pairs()
    t = alpha_dpo.lemma_4_3(x["logp"], x["ref"], x["ref"] - x["logp"])
    assert [t[k] for k in ("pearson", "spearman", "D_w", "D_l")] == pytest.approx([1] * 4) and t["std_d"] == t["std_m"]
    u = tensor([[1.0, 0.0], [3.0, 1.0], [3.0, 0.0]]).double()  # M = 1, 2, 3
    kl = tensor([[0.0, 4.0], [0.0, 6.0], [1.0, 6.0]]).double()  # δ = 4, 6, 5
    t = alpha_dpo.lemma_4_3(u, 0 * u, kl)
    assert t["pearson"] == pytest.approx(0.5) and t["std_d"] == pytest.approx(1.0)


def test_agreement_of_reward_and_likelihood():
    reward, logp = tensor([[1.0, 0.0], [1.0, 0.0]]), tensor([[-3.0, -4.0], [-3.0, -2.0]])
    assert alpha_dpo.agreement(reward, logp, tensor([[3.0, 3.0], [2.0, 2.0]])) == 0.5
    assert alpha_dpo.agreement(reward, logp, tensor([[3.0, 4.5], [3.0, 3.0]])) == 0.0  # per token, not per response


# ---- a followed run


@pytest.fixture
def job(small_task) -> dict:
    """A run of 4 steps."""
    return small_task | {"batch_size": 8, "lr": 1e-3, "max_steps": 4, "objective": "dpo(beta=0.5)"}


def test_following_a_run_does_not_change_it(job):
    """The same log-probs and answers in the end as train.train has; steps, judgements and the reference's margins."""
    plain, followed = miniature.experiment(job), alpha_dpo.follow(job | {"every": 3, "checkpoints": 2})
    assert [line["step"] for line in followed["lines"]] == [0, 3, 4] and [x["step"] for x in followed["judged"]] == [2, 4]
    logp, ref, kl, length = (tensor(followed["pairs"][k]) for k in ("logp", "ref", "kl", "length"))
    change = ((logp - ref).sum(0) / length.sum(0)).tolist()
    assert change == pytest.approx([plain["chosen"], plain["rejected"]], abs=1e-4)
    assert {k: followed["judged"][-1][k] for k in ("win_rate", "kl")} == {k: plain[k] for k in ("win_rate", "kl")}
    first, last = followed["lines"][0], followed["lines"][-1]
    assert first["kl_w"] == first["kl_l"] == 0 and first["a_w"] == pytest.approx((ref / length)[:, 0].mean().item(), abs=1e-4)
    assert last["kl_l"] == pytest.approx(kl[:, 1].mean().item(), abs=1e-4) and last["kl_l"] > 0
    assert len(followed["reference"]) == 4 and all(spread > 0 for _, spread, _ in followed["reference"])


@pytest.mark.parametrize("objective", ["sft", "kto", "tdpo1"])
def test_every_kind_of_objective_can_be_followed(job, objective):
    followed = alpha_dpo.follow(job | {"objective": objective, "every": 4, "checkpoints": 0, "max_steps": 1})
    assert np.shape(followed["pairs"]["kl"]) == (16, 2) and ("norm_w" in followed["lines"][-1]) == (objective != "kto")
    assert objective != "sft" or followed["lines"][-1]["norm_l"] == 0


def test_a_run_that_ends_early_says_why(job):
    assert "no argument 'tau'" in alpha_dpo.follow(job | {"objective": "dpo(tau=1.0)", "every": 1, "checkpoints": 1})["error"]


def test_gradient_norms_are_those_of_the_two_parts(job, tmp_path):
    """Each part is the gradient of the loss with the other side's log-probs held constant."""
    run = train.prepare(miniature.run_settings(job | {"objective": "simpo"}, str(tmp_path / "run")))
    pairs = run.held_out
    found = alpha_dpo.gradient_norms(run, pairs, run.held_out_inputs)
    batch = data.padded_batch(list(pairs))
    for side in "wl":
        logp = run.policy(batch)["logp"].view(-1, 2)
        w, low = logp[:, 0], logp[:, 1]
        w, low = (w, low.detach()) if side == "w" else (w.detach(), low)
        n_w, n_l = run.held_out_inputs["len"].T
        run.policy.zero_grad()
        OBJECTIVES["simpo"](w, low, n_w, n_l).mean().backward()
        norm = sum(p.grad.square().sum() for p in run.policy.parameters()).sqrt().item()
        assert found[f"norm_{side}"] == pytest.approx(norm, rel=1e-4)


# ---- the report


@pytest.fixture
def made_up(monkeypatch) -> list[dict]:
    """Instead of runs, results that follow from the job; the jobs that were asked for. ORPO ends early."""
    asked = []

    def run(job: dict, work) -> dict:
        asked.append(job)
        if "orpo" in job["objective"]:
            return {"job": job, "error": "the loss is not finite"}
        rate = 0.5 + 0.01 * (job["seed"] % 100) + job["lr"] + 0.001 * len(job["objective"])
        measures = dict.fromkeys(miniature.MEASURES, 1.0) | {"win_rate": rate, "lc_win_rate": rate, "quality": rate}
        if "every" not in job:
            return {"job": job, **measures, "start": dict.fromkeys(miniature.MEASURES, 0.5)}
        lines = [
            {"step": 4 * i, **{k: 0.1 * i + 0.5 for k in ("a_w", "a_l", "kl_w", "kl_l", "norm_w", "norm_l")}} for i in range(4)
        ]
        pairs = {k: x.tolist() for k, x in made_up_pairs(40).items()}
        judged = [measures | {"step": i, "kl": 0.5 * i} for i in (1, 2, 3, 4)]
        return {
            "job": job,
            "lines": lines,
            "judged": judged,
            "pairs": pairs,
            "reference": [[0.1, 1.0, 0.5]] * 5,
            "vocabulary": 91,
        }

    monkeypatch.setattr(miniature, "run_jobs", lambda jobs, file, work=None: [run(job, work) for job in jobs])
    return asked


PICTURES = {"reference.png", "kl.png", "alpha.png", "settings.png", "distributions.png", "gradients.png", "likelihood.png"}


def test_report(tmp_path, made_up):
    out = tmp_path / "out"
    miniature.main(["--paper", "alpha_dpo", "--seeds", "2", "--out", str(out), "--epochs", "2"])
    assert {p.name for p in out.iterdir()} >= PICTURES | {"report.md", "settings.json"}
    text = (out / "report.md").read_text()
    titles = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    assert titles[:4] == ["Table 1", "Table 2", "Table 5", "Table 6"] and len(titles) == 15
    lines = text.splitlines()
    assert sum(line.startswith("| ORPO |") and "| – |" in line and line.endswith("| 31.6 | 29.8 |") for line in lines) == 1
    # α-DPO: the longer call of the grid, the highest rate; win rate 0.5 + lr + len/1000, and 0.01 more in world 1
    call = "alpha_dpo(beta=2.5, gamma=0.375, alpha=0.125)"
    lr = max(miniature.LEARNING_RATES)
    rate = 100 * (0.5 + lr + 0.001 * len(call) + 0.005)
    assert any(line.startswith(f"| α-DPO | `{call}` | {lr:g} | {rate:.1f} ± 0.5 | {rate:.1f} ± 0.5 |") for line in lines)
    assert all(job["epochs"] == 2 for job in made_up)
    assert {job["seed"] for job in made_up if "every" in job} == {0, 1}
    assert not any("nan" in line for line in lines)


@pytest.mark.parametrize("broken", ["followed", "α-DPO", "all"])
def test_report_where_runs_ended_early(tmp_path, made_up, monkeypatch, broken):
    """It is written all the same."""
    run_jobs = miniature.run_jobs
    ends = {
        "followed": lambda job: "every" in job,
        "α-DPO": lambda job: "alpha_dpo" in job["objective"],
        "all": lambda job: True,
    }

    def one(job, file):
        return {"job": job, "error": "x"} if ends[broken](job) else run_jobs([job], file)[0]

    monkeypatch.setattr(miniature, "run_jobs", lambda jobs, file, work=None: [one(job, file) for job in jobs])
    miniature.main(["--paper", "alpha_dpo", "--seeds", "1", "--out", str(tmp_path / "out")])
    assert "### Table 6" in (tmp_path / "out" / "report.md").read_text()


def test_names_at_the_ends_of_lines_stand_apart():
    """In the order of the ends, inside the axes, and none over another."""
    plt = miniature.pyplot()
    figure, axis = plt.subplots()
    axis.set(xlim=(0, 10), ylim=(0, 1))
    ends = {"a": (10, 0.99, "k"), "b": (10, 0.98, "k"), "c": (10, 0.5, "k"), "d": (10, 0.985, "k")}
    alpha_dpo.name_ends(axis, ends)
    heights = {text.get_text(): text.xyann[1] for text in axis.texts}
    plt.close(figure)
    placed = sorted(heights, key=heights.get)
    assert placed == ["c", "b", "d", "a"] and heights["a"] < 1
    assert all(heights[high] - heights[low] > 0.059 for low, high in zip(placed, placed[1:]))


def test_paper_numbers_of_table_2_are_those_of_table_1():
    for of, column in alpha_dpo.PAPER_2.items():
        i = 2 * alpha_dpo.MODELS.index(of)
        assert column[:2] == (alpha_dpo.PAPER_1["SimPO"][i], alpha_dpo.PAPER_1["α-DPO"][i])


def test_a_job_asked_for_twice_runs_once(tmp_path, monkeypatch):
    job = dict(world="plain", cache=str(tmp_path), seed=0)
    monkeypatch.setattr(miniature, "task_of", str)
    monkeypatch.setattr(miniature, "ProcessPoolExecutor", InThisProcess)
    asked = []

    def work(job):
        return asked.append(job) or {"job": job}

    assert miniature.run_jobs([job, job], tmp_path / "runs.jsonl", work) == [{"job": job}] * 2 and asked == [job]
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == {"job": job}


class InThisProcess:
    """An executor of one process, this one."""

    def __init__(self, workers, context, initializer):
        assert workers >= 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, items):
        return map(function, items)

    def submit(self, function, job):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(job))
        return future
