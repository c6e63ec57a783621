"""Talking to an API server: access, requests, one reflector (list and watch with Replace).

Slim enough for the loader, so no pydantic, no kopf and no `kubernetes` here; and what the
objects mean is not known here either.
"""
