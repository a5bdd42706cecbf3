"""The table of evidence: where it starts, that it descends to the optimum, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from modekit.architecture.modekit_router import causal_average
from modekit.routing.evidence import TableSchedule, TokenRows, _drawn, averaged, train_table

HEIGHT = 12


def texts(seed: int, favourites: list[int], count: int = 60, length: int = 10) -> list[TokenRows]:
    """Sequences in which some tokens are frequent."""
    weights = torch.ones(HEIGHT)
    weights[favourites] = 6.0
    draw = torch.Generator().manual_seed(seed)
    return [TokenRows(torch.multinomial(weights, length, replacement=True, generator=draw).int()) for _ in range(count)]


DOMAINS = [texts(1, [2, 3]), texts(2, [4, 5]), texts(3, [3, 6])]


@pytest.mark.parametrize("decays", [(1.0,), (0.9, 1.0, 0.0)])
def test_weights_are_those_of_the_architecture(decays: tuple[float, ...]) -> None:
    """Of a text of several blocks, too."""
    values = torch.randn((2, 1_100, len(decays), 3), generator=torch.Generator().manual_seed(0))
    ones = torch.ones((2, 1_100))
    expected = sum(causal_average(values[:, :, place], ones, decay, None)[0] for place, decay in enumerate(decays))
    torch.testing.assert_close(averaged(values, decays), expected, atol=1e-5, rtol=1e-4)


def test_without_steps_it_is_naive_bayes_at_the_best_scale() -> None:
    trained = train_table(DOMAINS, HEIGHT, (1.0,), schedule=TableSchedule(steps=0, aside=1))
    counts = torch.stack(
        [torch.bincount(torch.cat([each.rows for each in domain]).long(), minlength=HEIGHT).double() for domain in DOMAINS]
    )
    logs = ((counts + 0.5) / (counts.sum(1, keepdim=True) + 0.5 * HEIGHT)).log()
    expected = (logs - logs.mean(0)).float()
    scale = trained.table[:, 0].norm() / expected.norm()
    torch.testing.assert_close(trained.table[:, 0], expected * scale)
    assert trained.steps == 0 and trained.after == trained.before


def test_training_descends_below_naive_bayes_towards_the_optimum() -> None:
    """The problem is convex: another optimiser on all of the text can tell how low it goes."""
    decays = (0.9,)
    trained = train_table(DOMAINS, HEIGHT, decays, schedule=TableSchedule(aside=1, steps=400, patience=50, learning_rate=0.05))
    rows = torch.stack([torch.stack([each.rows for each in domain]) for domain in DOMAINS]).long()
    labels = torch.arange(3)[:, None, None].expand(3, 60, 10)

    def loss_of(table: torch.Tensor) -> torch.Tensor:
        logits = averaged(table.t()[rows].flatten(0, 1)[:, :, None], decays)
        return cross_entropy(logits.flatten(0, 1), labels.flatten())

    best = torch.zeros((3, HEIGHT), requires_grad=True)
    optimizer = torch.optim.LBFGS([best], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(best)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum, ours = float(loss_of(best)), float(loss_of(trained.table[:, 0]))
    start = float(loss_of(train_table(DOMAINS, HEIGHT, decays, schedule=TableSchedule(steps=0, aside=1)).table[:, 0]))
    assert optimum - 1e-5 <= ours < optimum + 0.25 * (start - optimum)


def test_domains_count_equally_and_the_seed_decides() -> None:
    few = TableSchedule(aside=1, steps=20, learning_rate=0.02, tokens=300)
    one, other = (train_table(DOMAINS, HEIGHT, (0.9,), seed=seed, schedule=few) for seed in (3, 4))
    assert one.steps and not torch.equal(one.table, other.table)
    assert torch.equal(one.table, train_table(DOMAINS, HEIGHT, (0.9,), seed=3, schedule=few).table)
    twice = train_table([DOMAINS[0] * 2, *DOMAINS[1:]], HEIGHT, (0.9,), schedule=TableSchedule(steps=0))
    torch.testing.assert_close(
        twice.table,
        train_table(DOMAINS, HEIGHT, (0.9,), schedule=TableSchedule(steps=0)).table,
        atol=0.05,
        rtol=0.05,
    )


def test_it_starts_from_what_experts_expect_with_the_best_weight() -> None:
    """Token 9 is in no text, and the third expert expects it; where all expect the same it is as if nothing were known."""
    few = TableSchedule(steps=0, aside=2)
    unseen = [[TokenRows(each.rows.clamp(max=8)) for each in domain[:6]] for domain in DOMAINS]
    plain = train_table(unseen, HEIGHT, (1.0,), schedule=few)
    same = train_table(unseen, HEIGHT, (1.0,), schedule=few, expected=torch.full((3, HEIGHT), 7.0))
    assert torch.equal(same.table, plain.table)
    expected = torch.ones(3, HEIGHT)
    for row, favourites in zip(expected, ([2, 3], [4, 5], [3, 6, 9]), strict=True):
        row[favourites] = 6.0
    helped = train_table(unseen, HEIGHT, (1.0,), schedule=few, expected=expected, silent=[11])
    assert helped.before < plain.before
    assert int(helped.table[:, 0, 9].argmax()) == 2 != int(plain.table[:, 0, 9].argmax())
    assert not helped.table[..., 11].any()


def test_expectations_that_mislead_weigh_nothing() -> None:
    few, wrong = TableSchedule(steps=0, aside=1), torch.ones(3, HEIGHT)
    for row, favourites in zip(wrong, ([4, 5], [6], [2]), strict=True):
        row[favourites] = 20.0
    misled = train_table(DOMAINS, HEIGHT, (1.0,), schedule=few, expected=wrong)
    assert torch.equal(misled.table, train_table(DOMAINS, HEIGHT, (1.0,), schedule=few).table)


def test_silent_rows_stay_silent() -> None:
    trained = train_table(DOMAINS, HEIGHT, (0.9, 1.0), silent=[2, 7])
    assert not trained.table[..., [2, 7]].any() and trained.table[..., [3, 4]].all()
    assert trained.table.shape == (3, 2, HEIGHT)


def test_what_stands_before_the_start_is_read_and_not_learned_from() -> None:
    """The same tokens before the texts of all domains: they weigh in the averages, and no row of theirs is learned."""
    opening = torch.full((6,), 11, dtype=torch.int32)
    plain = [[TokenRows(each.rows.clamp(max=10)) for each in domain] for domain in DOMAINS]
    behind = [[TokenRows(torch.cat([opening, each.rows]), len(opening)) for each in domain] for domain in plain]
    few = TableSchedule(steps=0, aside=1)
    start = train_table(behind, HEIGHT, (1.0,), schedule=few).table
    assert float(start[:, 0, 11].abs().max()) < 1e-6  # naive Bayes has counted none of them
    scored = train_table([[TokenRows(each.rows) for each in domain] for domain in behind], HEIGHT, (1.0,), schedule=few)
    assert scored.before > train_table(behind, HEIGHT, (1.0,), schedule=few).before  # at the opening nothing is known


class Counted(torch.Tensor):
    """A tensor that counts how often one of its kind is asked for its length."""

    asked = 0

    def __len__(self) -> int:
        Counted.asked += 1
        return super().__len__()


def test_a_batch_of_many_short_texts_is_drawn_as_fast_as_one_of_few_long_ones() -> None:
    short = [TokenRows(torch.zeros(1, dtype=torch.int32).as_subclass(Counted)) for _ in range(400)]
    (batch,) = next(_drawn([short], 200, seed=0))
    assert int(batch.mask_BS.sum()) == 200 and Counted.asked < 20 * 200
