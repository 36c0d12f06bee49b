"""Ray: starts or joins it, checks its nodes, and submits commands to it.

Not here: the work that runs on Ray; other packages start Ray only through this one.

Start with: ``runtime.start_ray``, ``engine.choose_engine``, ``engine.in_processes``, ``submit.connect``.
"""
