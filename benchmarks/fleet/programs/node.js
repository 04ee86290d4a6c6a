// SPDX-License-Identifier: MIT
// Builds a graph of 200,000 small objects and waits.
//
// V8 gives memory back when a program has been idle for some seconds (its memory reducer, about a
// quarter here). Ready is only who is past that: else KSM would seem to save what V8 has freed.
'use strict';

const fs = require('fs');

const PATIENCE = 60;
const QUIET = 15;

const nodes = [];
for (let i = 0; i < 200000; i++) {
  nodes.push({ id: i, name: 'node ' + i, weight: i / 7, next: nodes[(i * 31) >> 5] || null });
}

const most = process.memoryUsage.rss();
let last = most;
let seconds = 0;
let quiet = 0;
const timer = setInterval(() => {
  const now = process.memoryUsage.rss();
  quiet = Math.abs(now - last) < last / 100 ? quiet + 1 : 0;
  last = now;
  seconds++;
  if ((now < 0.95 * most && quiet >= QUIET) || seconds >= PATIENCE) {
    clearInterval(timer);
    fs.writeFileSync(process.argv[2], '');
    setInterval(() => nodes.length, 3600 * 1000);
  }
}, 1000);
