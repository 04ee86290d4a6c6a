// SPDX-License-Identifier: MIT
// workers: eight threads with containers, strings, exceptions and over-aligned objects; prints what came out.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

struct alignas(128) Wide {
    unsigned long value[16] = {};
};

thread_local std::string name;
std::mutex lock;
std::map<std::string, unsigned long> results;

void work(unsigned number)
{
    std::vector<std::unique_ptr<Wide>> wide;
    std::map<unsigned, std::vector<char>> parts;
    unsigned long sum = 0;

    name = "worker number " + std::to_string(number) + " with a name too long for the string itself";
    for (unsigned i = 0; i < 2000; i++) {
        wide.push_back(std::make_unique<Wide>());
        wide.back()->value[i % 16] = i;
        if (reinterpret_cast<unsigned long>(wide.back().get()) % alignof(Wide) != 0)
            throw std::logic_error("alignment");
        parts[i % 97].assign(i * 37 % 20000, static_cast<char>(i));
        try {
            if (i % 50 == 0)
                throw std::runtime_error(name + std::to_string(i));
        } catch (const std::runtime_error &error) {
            sum += std::string(error.what()).size();
        }
    }
    for (const auto &one : wide)
        sum += *std::max_element(std::begin(one->value), std::end(one->value));
    for (const auto &one : parts)
        sum += one.second.size();
    const std::lock_guard<std::mutex> guard(lock);
    results[name] = sum;
}

} // namespace

int main()
{
    std::vector<std::thread> threads;

    for (unsigned i = 0; i < 8; i++)
        threads.emplace_back(work, i);
    for (auto &thread : threads)
        thread.join();
    for (const auto &one : results)
        std::printf("%s: %lu\n", one.first.c_str(), one.second);
    return 5;
}
