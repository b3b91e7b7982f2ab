"""The center over steps and over processes."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from esvit_core.losses import Center


def test_center_is_a_moving_average():
    center = Center(4, momentum=0.75)
    first, second = torch.randn(6, 4), torch.randn(2, 4)
    center.update(first)
    center.update(second)
    expected = 0.75 * (0.25 * first.mean(0)) + 0.25 * second.mean(0)
    torch.testing.assert_close(center.value[0], expected)


def test_center_of_bfloat16_logits_is_summed_in_float32():
    center = Center(1, momentum=0.0)
    center.update(torch.full((4096, 1), 1.0078125, dtype=torch.bfloat16))  # sums beyond 512 would round in bfloat16
    assert center.value.item() == 1.0078125


def _update(rank: int, world: int, address: str, logits: torch.Tensor, out: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    center = Center(logits.shape[1])
    center.update(logits.chunk(world)[rank])
    uneven = Center(logits.shape[1], share=Fraction([3, 5][rank], 8))
    for number, part in enumerate(logits.split([3, 5])[rank].tensor_split(2)):
        uneven.update(part, last=number == 1)
    assert not center.value.any()  # the sum may not have arrived
    for each in (center, uneven):
        each.finish()
    torch.save((center.value, uneven.value), f"{out}-{rank}.pt")
    dist.destroy_process_group()


def test_center_covers_the_batch_of_all_processes(tmp_path):
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    arguments = 2, f"file://{tmp_path}/rendezvous", logits, f"{tmp_path}/center"
    mp.start_processes(_update, arguments, nprocs=2, start_method="fork")  # which have imported torch
    alone = Center(5)
    alone.update(logits)
    for rank in range(2):
        even, uneven = torch.load(tmp_path / f"center-{rank}.pt")
        torch.testing.assert_close(even, alone.value)
        torch.testing.assert_close(uneven, alone.value)


def test_the_center_waits_for_the_last_micro_batch():
    whole, center, logits = Center(4), Center(4), torch.randn(7, 4)
    whole.update(logits)
    for part, last in ((logits[:3], False), (logits[3:5], False), (logits[5:], True)):
        assert not center.value.any()
        center.update(part, last)
    torch.testing.assert_close(center.value, whole.value)
