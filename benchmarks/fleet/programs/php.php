<?php
// SPDX-License-Identifier: MIT
// Fills an array of 200,000 entries and waits.
$known = [];
for ($i = 0; $i < 200000; $i++) {
    $known["key $i"] = ['number' => $i, 'text' => "value $i"];
}

touch($argv[1]);
while ($known) {
    sleep(3600);
}
