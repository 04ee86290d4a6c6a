# SPDX-License-Identifier: MIT
# Loads much of what comes with Perl, fills a hash of 60,000 entries, and waits.
use strict;
use warnings;

use B;
use Benchmark;
use Compress::Zlib;
use CPAN::Meta;
use Data::Dumper;
use Digest::SHA;
use Encode;
use File::Copy;
use File::Find;
use File::Temp;
use Getopt::Long;
use HTTP::Tiny;
use IO::Select;
use IO::Socket::INET;
use IPC::Open3;
use JSON::PP;
use List::Util;
use Math::BigFloat;
use MIME::Base64;
use Module::CoreList;
use Net::FTP;
use Pod::Man;
use Pod::Simple;
use Pod::Text;
use POSIX;
use Socket;
use Storable;
use Term::ANSIColor;
use Test::More;
use Text::Balanced;
use Text::Wrap;
use Time::HiRes;
use Time::Local;
use Unicode::Collate;
use Unicode::UCD;

my %known = map { ("key $_" => { number => $_, text => "value $_" }) } 1 .. 60_000;

open(my $ready, '>', $ARGV[0]) or die "$ARGV[0]: $!";
close($ready);
sleep while keys %known;
