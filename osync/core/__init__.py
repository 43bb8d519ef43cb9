"""Pure decisions: functions of state and time, without I/O, clock or loop."""
