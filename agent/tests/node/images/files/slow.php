<?php
// A signal ends sleep() early, so sleep until the time has come.
for ($end = microtime(true) + $_GET['ms'] / 1000; microtime(true) < $end;) {
    usleep(100000);
}
echo "done\n";
