"""What a model or a sub-network costs: counted parameters, FLOPs and bytes, measured milliseconds."""

from elastic_lm.deprecated import old_room_names as _old_room_names

__getattr__ = _old_room_names(__name__)
