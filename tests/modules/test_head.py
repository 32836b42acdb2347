import pytest
import torch
from core_fixtures import CPU

from cl_peft.modules.head import Head


def head(classes, seed=0, width=6):
    return Head.fresh(classes, width, torch.Generator().manual_seed(seed), CPU)


def test_fresh_head_is_decided_by_its_generator():
    one, again, other = head((4, 7, 1)), head((4, 7, 1)), head((4, 7, 1), seed=1)
    assert torch.equal(one.weight, again.weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.weight.abs().max() <= 1 / 6**0.5
    assert not one.bias.any()
    assert all(t.is_leaf and t.requires_grad for t in one.parameters)


def test_logits_equal_torch_linear():
    h = head((4, 7))
    h.bias.data = torch.tensor([1.0, -2.0])
    x = torch.randn(3, 6)
    torch.testing.assert_close(h(x), torch.nn.functional.linear(x, h.weight, h.bias))


def test_widen_keeps_what_it_knew_and_adds_only_new_classes():
    old = head((4, 7))
    old.bias.data = torch.tensor([1.0, -2.0])
    wide = old.widen((7, 2, 9), torch.Generator().manual_seed(5))
    assert wide.classes == (4, 7, 2, 9)
    assert torch.equal(wide.weight[:2], old.weight)
    assert torch.equal(wide.bias, torch.tensor([1.0, -2.0, 0.0, 0.0]))
    assert all(t.is_leaf and t.requires_grad for t in wide.parameters)
    with torch.no_grad():
        wide.weight.zero_()
    assert old.weight.any()  # a copy
    same = old.widen((4, 7), torch.Generator())
    assert same.classes == (4, 7)
    assert torch.equal(same.weight, old.weight)


def test_local_maps_labels_and_refuses_foreign_ones():
    h = head((4, 7, 1))
    assert h.local(torch.tensor([1, 4, 4, 7])).tolist() == [2, 0, 0, 1]
    for wrong in (3, 99):
        with pytest.raises(ValueError, match=str(wrong)):
            h.local(torch.tensor([4, wrong]))


def test_stored_and_back():
    h = head((4, 7, 1))
    back = Head.from_tensors(h.tensors(), CPU)
    assert back.classes == h.classes
    assert torch.equal(back.weight, h.weight)
    assert torch.equal(back.bias, h.bias)
    frozen = h.frozen()
    h.weight.data.zero_()
    assert frozen.weight.any()
    assert not frozen.weight.requires_grad
