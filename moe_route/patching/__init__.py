"""Attach to a live model: the only package that changes one."""

from moe_route.patching.attachment import AlreadyAttachedError, Attachment, attachment_of

__all__ = ["AlreadyAttachedError", "Attachment", "attachment_of"]
