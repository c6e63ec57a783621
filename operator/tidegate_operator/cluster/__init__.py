"""The operator in a cluster: objects of an API server in, our own kinds out.

`kinds` decodes, `world` is pure (snapshot -> World), `store` writes, `runner` decides when,
`statuses` tells people, `main` puts them together with kopf around it. Nothing here knows
what a policy means: that is `meanings` and `compile`, shared with the folder.
"""
