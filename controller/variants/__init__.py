"""Variants: what the catalog wants, what workers have, how the difference is mended, and what requests are told of it.

catalog ──refresh──► directory ◄──reads── gateway (who can take a request), admin, metrics
                       │  ▲
              mending (pure: the next step)
                       ▼  │ failures
heartbeat, admin ──► reconciler ──/internal/variants/*──► workers
"""
