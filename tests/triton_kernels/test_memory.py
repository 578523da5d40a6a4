"""What a launcher holds at its peak."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """The most bytes that live at a time of those that are allocated inside the `with` block."""

    def __enter__(self):
        self.known, self.now, self.peak = set(), 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and not ({id(tensor.untyped_storage())} & (given | self.known)):
                storage = tensor.untyped_storage()
                self.known.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, id(storage), storage.nbytes())
        return result

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


def test_chunks_of_linear_cross_entropy_share_their_memory(kernel, monkeypatch):
    """A frozen head: beyond the gradient, one chunk's logits and a little, however many chunks there are."""
    from pyfast.kernels import launch

    monkeypatch.setattr(launch, "run", lambda *_, **__: None)  # the interpreter's own copies do not count

    x, weight = torch.randn(96, 32).bfloat16(), torch.randn(4000, 32).bfloat16()
    target, upstream = torch.randint(4000, (96,)), torch.ones(96, 2, dtype=torch.float64)
    chunk = 16 * 4000 * 2
    call = launch.launchers()["linear_cross_entropy"]
    needs = [True, False, False, False, False]
    with Allocated() as allocated:
        call(x, weight, None, None, None, target, None, upstream, 1.0, -100, 0.0, None, 1.0, chunk, needs)
    assert chunk < allocated.peak - x.nbytes < 1.5 * chunk
