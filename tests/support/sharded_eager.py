"""What two ranks do with the ops by hand: DTensors, and attention as a module. One launch for both."""

from support import distributed_attention_cases, dtensor_cases

CASES = {**dtensor_cases.CASES, **distributed_attention_cases.CASES}
