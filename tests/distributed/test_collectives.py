"""What the errors of collectives mean; the collectives themselves run in the tests of their callers."""

import pytest
import torch.distributed as dist

from gptoss_dist.distributed.collectives import is_peer_loss


def chained(error: Exception, *, cause: Exception | None = None, context: Exception | None = None) -> Exception:
    error.__cause__, error.__context__ = cause, context
    return error


PEER = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (PEER, True),
        (chained(ValueError("cannot be read"), cause=PEER), True),
        (chained(RuntimeError("a kernel failed"), context=PEER), False),
        (dist.DistNetworkError("The client socket has failed to connect"), True),
        (dist.DistBackendError("NCCL error: ncclInvalidUsage, Duplicate GPU detected : rank 0 and rank 1"), False),
        (dist.DistBackendError("NCCL error: ncclRemoteError, a call failed possibly due to a network error"), True),
        (RuntimeError("triton: ptxas timed out"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_the_loss_of_a_peer_is_told_from_other_errors(error, is_loss):
    assert is_peer_loss(error) is is_loss
