"""One run of ``DeltaPruneCallback``: the callback says when, :class:`~dpp_lightning.callbacks.prune_run.run.PruneRun`
prunes, scores, saves and puts the weights back, by the settings of :mod:`dpp_lightning.callbacks.prune_run.settings`."""
