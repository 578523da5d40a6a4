"""Arguments of the schemas that the CUDA and the Triton kernels both serve, a few calls each."""

import torch

x, target = torch.randn(5, 40)[:, :33], torch.tensor([3, 32, 2, 0, -100])
q, kv = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 12, 16)
seed, cu_q, cu_k = torch.tensor(3), torch.tensor([0, 4, 9]), torch.tensor([0, 7, 12])
packed_q, packed_kv = torch.randn(9, 4, 16), torch.randn(12, 2, 16)
sums, packed_sums = torch.randn(1, 4, 9), torch.randn(4, 9)
#: attention's options
batched = (torch.randn(4), torch.rand(1, 12) < 0.7, torch.randn(1, 1, 9, 12), seed, None, None, 0, 0.3, 5.0, 6, 0, 0.2)
packed = (None, None, None, None, cu_q, cu_k, 7, 0.3, 0.0, -1, 0, 0.0)

#: schema -> arguments
CALLS = {
    "cross_entropy": [
        (x, target, None, None, -100, 0.0, None),
        (x, target, torch.rand(33), torch.rand(5, 2, dtype=torch.float64), -100, 0.1, 2.0),
    ],
    "attention": [(q, kv, kv, *batched), (packed_q, packed_kv, packed_kv, *packed)],
    "attention_backward": [
        (q, sums, q, kv, kv, q, sums, sums, *batched, True),
        (packed_q, None, packed_q, packed_kv, packed_kv, packed_q, packed_sums, packed_sums, *packed, False),
    ],
}
