"""The centre over steps and over processes."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from esvit_core.losses import Centre


def test_centre_is_a_moving_average():
    centre = Centre(4, momentum=0.75)
    first, second = torch.randn(6, 4), torch.randn(2, 4)
    centre.update(first)
    centre.update(second)
    expected = 0.75 * (0.25 * first.mean(0)) + 0.25 * second.mean(0)
    torch.testing.assert_close(centre.value[0], expected)


def test_centre_of_bfloat16_logits_is_summed_in_float32():
    centre = Centre(1, momentum=0.0)
    centre.update(torch.full((4096, 1), 1.0078125, dtype=torch.bfloat16))  # sums beyond 512 would round in bfloat16
    assert centre.value.item() == 1.0078125


def _update(rank: int, world: int, address: str, logits: torch.Tensor, out: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    centre = Centre(logits.shape[1])
    centre.update(logits.chunk(world)[rank])
    uneven = Centre(logits.shape[1], share=Fraction([3, 5][rank], 8))
    for number, part in enumerate(logits.split([3, 5])[rank].tensor_split(2)):
        uneven.update(part, last=number == 1)
    torch.save((centre.value, uneven.value), f"{out}-{rank}.pt")
    dist.destroy_process_group()


def test_centre_covers_the_batch_of_all_processes(tmp_path):
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    mp.spawn(_update, (2, f"file://{tmp_path}/rendezvous", logits, f"{tmp_path}/centre"), nprocs=2)
    alone = Centre(5)
    alone.update(logits)
    for rank in range(2):
        even, uneven = torch.load(tmp_path / f"centre-{rank}.pt")
        torch.testing.assert_close(even, alone.value)
        torch.testing.assert_close(uneven, alone.value)


def test_the_centre_waits_for_the_last_micro_batch():
    whole, centre, logits = Centre(4), Centre(4), torch.randn(7, 4)
    whole.update(logits)
    for part, last in ((logits[:3], False), (logits[3:5], False), (logits[5:], True)):
        assert not centre.value.any()
        centre.update(part, last)
    torch.testing.assert_close(centre.value, whole.value)
