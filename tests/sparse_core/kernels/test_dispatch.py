"""Kernels in programs of every kind: compiled by torch, forked, with threads, and where nothing can be written."""

import os
import subprocess
import sys

import pytest
import torch

from sparse_core.attention.masks import BlockMask, TokenCSR
from sparse_core.kernels import dispatch
from sparse_core.kernels.block_attention import IMPLEMENTATIONS, block_sparse_attention
from sparse_core.kernels.csr_attention import csr_attention

HEAD = """
import os, sys, torch
from sparse_core import BlockMask, IndexMask, block_sparse_attention, decode_attention
from sparse_core.kernels.csr_attention import csr_attention
from sparse_core.kernels.label_scores import label_scores, quantise
from sparse_core.attention.masks import TokenCSR, causal
q, k, v = torch.randn(3, 1, 2, 128, 16, generator=torch.Generator().manual_seed(0)).unbind()
mask = BlockMask.from_rule(causal, q_len=128, kv_len=128, block_size=32)
"""
# The compiler takes seconds to import and brings triton in: neither is for those who do not use it.
COMPILE = """
assert "torch._dynamo" not in sys.modules
rows, labels = TokenCSR.from_token_mask(mask.to_token_mask()), quantise(k)
keys = IndexMask(index=torch.arange(0, 128, 3).expand(1, 2, 1, -1), kv_len=128)
def everything(q):
    out = block_sparse_attention(2 * q, k, v, mask) + csr_attention(q, k, v, rows)
    newest = q[:, :, :1].detach()
    return out + decode_attention(newest, (k, v), keys) + label_scores(newest[:, :, 0], labels)[..., None]
x = q.clone().requires_grad_()
compiled = torch.compile(everything, backend="eager")
first = torch.autograd.grad(compiled(x).square().sum(), x)[0]
plain = torch.autograd.grad(everything(x).square().sum(), x)[0]
assert torch.equal(first, plain) and torch.equal(compiled(x), everything(x))
narrow = torch.compile(lambda q, k, v, mask, scale: block_sparse_attention(q, k, v, mask, scale=scale), backend="eager")
for n in range(1, 13):  # more than the compiler makes versions for
    part = BlockMask.from_dense_blocks(torch.eye(4) > 0, block_size=32, q_len=128, kv_len=128)
    x = [t[..., :n].contiguous() for t in (q, k, v)]
    assert torch.equal(narrow(*x, part, 0.1 * n), block_sparse_attention(*x, part, scale=0.1 * n))
print("compiled")
"""
FORK = """
import time
parent = block_sparse_attention(q, k, v, mask).sum().item()
child = os.fork()
if child == 0:
    os._exit(0 if block_sparse_attention(q, k, v, mask).sum().item() == parent else 1)
for _ in range(300):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(status)
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child waits for ever")
"""
UNCACHED = """
import logging
logging.basicConfig(stream=sys.stdout, format="%(message)s")
print(block_sparse_attention(q, k, v, mask).shape)
labels = label_scores(q[:, :, 0], quantise(k))
"""


def run(program, timeout=240, **environment):
    return subprocess.run(
        [sys.executable, "-c", HEAD + program], capture_output=True, text=True, timeout=timeout,
        env=os.environ | environment,
    )  # fmt: skip


def test_torch_compiles_around_the_kernels():
    done = run(COMPILE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_a_forked_process_has_threads_of_its_own():
    done = run(FORK, SPARSE_CORE_THREADS="2")
    assert done.returncode == 0, done.stderr[-3000:]


def test_kernels_run_where_nothing_can_be_written(tmp_path):
    """A file in the place of every folder that numba would make; permissions would not stop an administrator."""
    package = tmp_path / "installed"
    package.mkdir()
    kernels = package / "kernels.py"
    kernels.write_text(
        "import numba.core.caching as caching\n"
        "for name in caching.CacheImpl._locator_classes:\n"
        "    name.ensure_cache_path = lambda self: (_ for _ in ()).throw(OSError('read-only file system'))\n"
    )
    done = run(f"exec(open({str(kernels)!r}).read())\n" + UNCACHED, HOME=str(kernels))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch.Size([1, 2, 128, 16])" in done.stdout
    assert done.stdout.count("set NUMBA_CACHE_DIR") == 1


@pytest.mark.parametrize("asked", ["abc", "0", "-2", "1.5", ""])
def test_threads_are_counted_in_whole_numbers(asked, monkeypatch):
    monkeypatch.setenv("SPARSE_CORE_THREADS", asked)
    q, mask = torch.zeros(1, 1, 64, 16), BlockMask.from_dense_blocks(
        torch.ones(1, 1, dtype=torch.bool), block_size=64, q_len=64, kv_len=64
    )  # fmt: skip
    with pytest.raises(ValueError, match="SPARSE_CORE_THREADS: expected a whole number of at least 1, got"):
        block_sparse_attention(q, q, q, mask, implementation="numba")


def test_float64_stays_float64_by_itself():
    chosen = [dispatch.choose(torch.device(name), IMPLEMENTATIONS, torch.float64) for name in ("cpu", "cuda")]
    assert chosen == ["gather", "gather"]
    assert dispatch.choose(torch.device("cpu"), IMPLEMENTATIONS, torch.bfloat16) == "numba"


def test_a_kernel_of_another_device_is_refused():
    with pytest.raises(ValueError, match="implementation: expected one for tensors on meta, got 'numba'"):
        dispatch.find("sparse_core.kernels.block_attention", "numba", torch.device("meta"), IMPLEMENTATIONS)


def attentions():
    blocks = BlockMask.from_dense_blocks(
        torch.tensor([[True, False], [True, True]]), block_size=16, q_len=32, kv_len=32
    )
    rows = TokenCSR.from_token_mask(blocks.to_token_mask())
    return {"blocks": (block_sparse_attention, blocks), "rows": (csr_attention, rows)}


def draw(dtype=torch.float32):
    return torch.randn(3, 1, 2, 32, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_a_second_backward_pass_is_given_or_refused(kind):
    attend, mask = attentions()[kind]
    second = []
    for name in ("gather", "reference", "numba"):
        inputs = [x.clone().requires_grad_() for x in draw()]
        out = attend(*inputs, mask, implementation=name)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        penalty = sum(x.square().sum() for x in first)
        if name == "numba":
            with pytest.raises(RuntimeError, match="differentiate twice"):
                penalty.backward()
        else:
            second.append(torch.autograd.grad(penalty, inputs))
    torch.testing.assert_close(*second, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_transforms_of_functions_are_refused_where_they_do_not_work(kind):
    attend, mask = attentions()[kind]
    q, k, v = draw()

    def gradient(name):
        return torch.func.grad(lambda x: attend(x, k, v, mask, implementation=name).square().sum())(q)

    with pytest.raises(RuntimeError, match="expected no transform of torch.func around a kernel .*'gather'"):
        gradient("numba")
    torch.testing.assert_close(gradient("gather"), gradient("reference"), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_gradients_in_float64_are_those_of_differences(kind):
    attend, mask = attentions()[kind]
    inputs = [x.clone().requires_grad_() for x in draw(torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask), inputs, fast_mode=True)
