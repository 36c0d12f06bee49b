"""The HTTP service, on Ray Serve or in one process, and its client.

Around the application: ``schema`` (wire types), ``settings``, ``auth`` (key, host), ``middleware`` (ids, log, limits),
``problems`` (errors), ``uploads`` (bodies in), ``answers`` (bodies out), ``routes`` (all of it together).
Live: ``streams``, over ``pipeline.audio.live`` (sound in pieces).
What answers: ``worker`` runs a model in batches (``batching``); ``service`` is what the two sides tell each other.
On Ray: ``deployment`` (ingress, workers, asking them), ``ray_settings`` (Serve's proxy). Without:
``local``. Figures of both: ``metrics``.
``client`` is for everybody else, with ``client_wire`` beneath; it needs neither library nor Ray.
"""
