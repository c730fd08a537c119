"""What property tests draw: always the same examples."""

from hypothesis import settings
from hypothesis import strategies as st

from beyond.segments import SEGMENTS
from cskv import BiBranchCache
from tests.helpers import OneToken

quick = settings(max_examples=25, deadline=None, derandomize=True)

shapes = st.fixed_dictionaries(
    {
        "num_attention_heads": st.sampled_from([4]),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "attention_bias": st.booleans(),
        "sliding_window": st.sampled_from([None, None, 3, 9]),
    }
)
prompts = st.integers(1, 12)
steps = st.integers(1, 14)
ranks = st.integers(1, 5)
windows = st.integers(1, 30)
sinks = st.sampled_from([0, 1, 4])
kinds = st.sampled_from([BiBranchCache, OneToken])
bits = st.sampled_from([2, 3, 4, 8])
bits_or_16 = st.sampled_from([2, 3, 4, 8, 16])
widths = st.sampled_from([2, 3, 4, 8, 16, 32])  # of latents, packed or not
groups = st.sampled_from([None, 32, 64])  # of latents; see LowRank
schedules = st.sampled_from(  # of segments
    [SEGMENTS, ((1, 0),), ((7, 0),), ((32, 0),), ((2, 9), (4, 0)), ((1, 5), (8, 20), (64, 0))]
)
