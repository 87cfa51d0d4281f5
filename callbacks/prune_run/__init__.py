"""One run of ``DeltaPruneCallback``: what it prunes, what it scores on, and what it leaves."""
