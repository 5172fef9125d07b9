# Counts the words of the files that it is given; the commonest go to standard output, all of them to words.tsv.
use strict;
use warnings;

my %count;
while (<>) {
    $count{lc $1}++ while /([[:alpha:]']+)/g;
}
my @words = sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count;
open my $file, '>', 'words.tsv' or die "words.tsv: $!";
print {$file} "$_\t$count{$_}\n" for @words;
close $file or die "words.tsv: $!";
printf "%-8s %d\n", $_, $count{$_} for @words[0 .. 4];
printf "%d different words\n", scalar @words;
