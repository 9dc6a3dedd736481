"""The expert MLPs: one function, `grouped_experts.grouped_experts`, and its back ends."""
