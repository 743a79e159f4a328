"""Floor 2, what should be computed: policies, where they come from, and the decision for each site."""
