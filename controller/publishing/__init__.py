"""Releases: fine-tunes that are published version by version, and what their public names stand for.

PUT /admin/blobs ──► store ◄── GET /internal/blobs ◄── workers
POST …/versions ──► catalog: version, a variant name@vN that is wanted
                       │ roll-out: workers read it and ask its probe (controller.variants, model_worker)
                       ▼
PUT …/aliases ──► catalog: alias ──► directory ──► gateway: name → name@vN, canary, shadow ──► controller.gateway
"""
