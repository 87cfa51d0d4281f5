"""One run of ``DeltaPruneCallback``. The callback says when; ``PruneRun`` in ``run.py`` prunes, scores, saves and puts
the weights back, as ``PruneSettings`` in ``settings.py`` says."""
