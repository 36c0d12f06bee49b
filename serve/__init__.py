"""The HTTP service, on Ray Serve or in one process, and its client.

HTTP side: ``schema`` (requests and responses), ``settings``, ``auth`` (API key, host), ``middleware`` (ids, log,
limits), ``problems`` (errors), ``uploads`` (reads requests), ``answers`` (builds responses), ``routes``.
Live: ``streams``, on top of ``pipeline.audio.live``.
Model side: ``worker`` runs a model, in batches (``batching``). ``service`` has the types that both sides exchange.
On Ray: ``deployment`` (ingress and worker processes), ``ray_settings`` (Serve's proxy). Without Ray: ``local``.
Prometheus metrics of both: ``metrics``.
For callers: ``client``, and ``client_wire`` beneath it. They need neither ``pipeline`` nor Ray.
"""
