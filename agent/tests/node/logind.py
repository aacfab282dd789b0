"""Stands in for systemd-logind on the bus at $DBUS_SYSTEM_BUS_ADDRESS: a Manager with one property.

Says "ready" once it has its name. A line on standard input sets the property: "true" or "false".
"""

import sys

from gi.repository import Gio, GLib

NAME = "org.freedesktop.login1"
MANAGER = """
<node><interface name="org.freedesktop.login1.Manager">
  <property name="PreparingForShutdown" type="b" access="read"/>
</interface></node>
"""
value = False
loop = GLib.MainLoop()


def on_line(source, _condition):
    global value
    line = source.readline()
    if not line:
        loop.quit()
        return False
    value = line.strip() == "true"
    print("set", flush=True)
    return True


bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
interface = Gio.DBusNodeInfo.new_for_xml(MANAGER).interfaces[0]
bus.register_object(
    "/org/freedesktop/login1", interface, None, lambda *_: GLib.Variant("b", value), None
)
Gio.bus_own_name_on_connection(
    bus, NAME, Gio.BusNameOwnerFlags.NONE, lambda *_: print("ready", flush=True), lambda *_: loop.quit()
)
GLib.io_add_watch(sys.stdin, GLib.IO_IN | GLib.IO_HUP, on_line)
loop.run()
