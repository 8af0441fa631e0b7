"""What things are: frozen, validated dataclasses, static under `jit`; users find them under `el`."""

from elastic_lm.deprecated import old_room_names as _old_room_names

__getattr__ = _old_room_names(__name__)
