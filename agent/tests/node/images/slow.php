<?php
// A signal ends sleep() early, so sleep until the time has come.
for ($end = microtime(true) + 3; microtime(true) < $end;) {
    usleep(100000);
}
echo "done\n";
